"""What one dispatch is told and what it reports: host arrays, made afresh for each and never reused.

Letters: R rows, S slots, T tokens of a prefill chunk, K decode steps, E stop ids, B banned ids, V vocabulary.
Arrays of a batch are in row order; `threads[i]` is served by row i.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from apr_kernels.plan import Plan

from apr_jax.engine.thread import Thread

PADDING_ID = -1


@dataclasses.dataclass(frozen=True)
class PrefillBatch:
    """Tokens to feed without sampling.

    Attributes:
      tokens, positions: i32[R, T]; num_queries: i32[R] valid ones; tail_len: i32[S].
    """

    threads: tuple[Thread, ...]
    plan: Plan
    tail_len: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    num_queries: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecodeBatch:
    """Up to K steps for each row.

    Attributes:
      forced: i32[R, K] tokens to feed first, of which num_forced: i32[R] are valid; the last one's logits sample.
      position: i32[R] of the first fed token.
      capacity: i32[R] tokens the row may feed: what its reserved pages hold; 0 is a padding row.
      budget: i32[R] tokens the row may sample.
      stop_ids: i32[R, E], PADDING_ID beyond; drain: bool[R, E] whether that stop is fed too, so that the
        segment can be sealed without another dispatch.
      num_sampled, key, temperature, ...: as the sampler's state.
      seen: bool[R, V] tokens that penalties count, or None where no row has one.
    """

    threads: tuple[Thread, ...]
    plan: Plan
    tail_len: np.ndarray
    forced: np.ndarray
    num_forced: np.ndarray
    position: np.ndarray
    capacity: np.ndarray
    budget: np.ndarray
    stop_ids: np.ndarray
    drain: np.ndarray
    num_sampled: np.ndarray
    key: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition_penalty: np.ndarray
    top_k: np.ndarray
    banned_ids: np.ndarray
    wants_logprobs: np.ndarray
    seen: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """What a decode dispatch did, in row order.

    Attributes:
      tokens: i32[R, K] sampled at each step, PADDING_ID where none; logprobs: f32[R, K].
      num_fed: i32[R] tokens that have keys now: the forced ones first, then the sampled ones in order.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    num_fed: np.ndarray


def _by_row(plan: Plan, threads_by_slot: dict[int, Thread]) -> tuple[Thread, ...]:
    slots = [int(slot) for slot in np.asarray(plan.row_slot)]
    return tuple(threads_by_slot[slot] for slot in slots if slot in threads_by_slot)


def _tail_len(threads_by_slot: dict[int, Thread], num_slots: int) -> np.ndarray:
    tail_len = np.zeros(num_slots, np.int32)
    for slot, thread in threads_by_slot.items():
        assert thread.context is not None
        tail = thread.context.tail
        tail_len[slot] = 0 if tail is None else len(tail.token_ids)
    return tail_len


def prefill_batch(
    threads_by_slot: dict[int, Thread], num_tokens: dict[int, int], plan: Plan, num_slots: int, chunk: int
) -> PrefillBatch:
    """A batch that feeds the first num_tokens[thread.id] pending tokens of each thread."""
    threads = _by_row(plan, threads_by_slot)
    num_rows = len(np.asarray(plan.row_slot))
    tokens = np.zeros((num_rows, chunk), np.int32)
    positions = np.zeros((num_rows, chunk), np.int32)
    num_queries = np.zeros(num_rows, np.int32)
    for row, thread in enumerate(threads):
        assert thread.context is not None
        n = num_tokens[thread.id]
        tokens[row, :n] = thread.pending[:n]
        positions[row] = thread.context.next_position + np.arange(chunk)
        num_queries[row] = n
    return PrefillBatch(threads, plan, _tail_len(threads_by_slot, num_slots), tokens, positions, num_queries)


def _seen(threads: Sequence[Thread], num_rows: int, vocab_size: int) -> np.ndarray | None:
    if all(thread.sampling.repetition_penalty == 1.0 for thread in threads):
        return None
    seen = np.zeros((num_rows, vocab_size), bool)
    for row, thread in enumerate(threads):
        if thread.sampling.repetition_penalty != 1.0:
            seen[row, thread.visible_ids()] = True
    return seen


def decode_batch(
    threads_by_slot: dict[int, Thread],
    capacity: dict[int, int],
    plan: Plan,
    *,
    num_slots: int,
    num_steps: int,
    max_stop_ids: int,
    eos_ids: Sequence[int],
    vocab_size: int,
) -> DecodeBatch:
    """A batch in which each thread feeds at most capacity[thread.id] tokens and samples at most its budget."""
    threads = _by_row(plan, threads_by_slot)
    rows = len(np.asarray(plan.row_slot))
    forced = np.zeros((rows, num_steps), np.int32)
    stop_ids = np.full((rows, max_stop_ids), PADDING_ID, np.int32)
    banned_ids = np.full((rows, max_stop_ids), PADDING_ID, np.int32)
    drain = np.zeros((rows, max_stop_ids), bool)
    ints = {
        name: np.zeros(rows, np.int32)
        for name in ("num_forced", "position", "capacity", "budget", "num_sampled", "top_k")
    }
    floats = {name: np.ones(rows, np.float32) for name in ("top_p", "repetition_penalty")}
    floats |= {name: np.zeros(rows, np.float32) for name in ("temperature", "min_p")}
    key = np.zeros((rows, 2), np.uint32)
    wants_logprobs = np.zeros(rows, bool)
    for row, thread in enumerate(threads):
        assert thread.context is not None
        params = thread.sampling
        pending = thread.pending[:num_steps]
        forced[row, : len(pending)] = pending
        ints["num_forced"][row] = len(pending)
        ints["position"][row] = thread.context.next_position
        ints["capacity"][row] = capacity[thread.id]
        left = min(1, thread.budget) if thread.avoided_ids else thread.budget  # ids are avoided in one place only
        ints["budget"][row] = left if len(thread.pending) <= num_steps else 0
        ints["num_sampled"][row] = thread.num_sampled
        ints["top_k"][row] = params.top_k
        floats["temperature"][row] = params.temperature
        floats["top_p"][row] = params.top_p
        floats["min_p"][row] = params.min_p
        floats["repetition_penalty"][row] = params.repetition_penalty
        drained = list(dict.fromkeys(params.stop_ids))
        stops = drained + ([] if params.ignore_eos else [i for i in dict.fromkeys(eos_ids) if i not in drained])
        stop_ids[row, : len(stops)] = stops
        drain[row, : len(drained)] = True
        banned = (*params.banned_ids, *thread.avoided_ids)
        banned_ids[row, : len(banned)] = banned
        key[row] = thread.key()
        wants_logprobs[row] = params.logprobs
    return DecodeBatch(
        threads=threads,
        plan=plan,
        tail_len=_tail_len(threads_by_slot, num_slots),
        forced=forced,
        stop_ids=stop_ids,
        drain=drain,
        banned_ids=banned_ids,
        key=key,
        wants_logprobs=wants_logprobs,
        seen=_seen(threads, rows, vocab_size),
        **ints,
        **floats,
    )
