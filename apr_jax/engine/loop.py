"""The loop: threads come in, run and stop. One step reads: schedule, run, postprocess.

Knows token ids only; what they mean is for programs. `engine.py` adds how threads fork and join.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

from apr_kernels.plan import Plan

from apr_jax.cache.layout import PlanOverflow
from apr_jax.cache.plan_builder import PlanBuilder
from apr_jax.config import CacheConfig, EngineConfig, ModelConfig, check
from apr_jax.engine import events
from apr_jax.engine.batch import PADDING_ID, DecodeBatch, DecodeResult, decode_batch, prefill_batch
from apr_jax.engine.kernels import fill_chip
from apr_jax.engine.runner import Runner
from apr_jax.engine.scheduler import Work
from apr_jax.engine.stop_strings import find_stop
from apr_jax.engine.thread import Family, Status, Stop, Thread
from apr_jax.engine.tree import ThreadTree
from apr_jax.models.decoder import Decoder
from apr_jax.tokenizers import Tokenizer
from apr_jax.types import SamplingParams


class Loop(ThreadTree):
    """Runs threads until they stop.

    Args:
      model_config, decoder: the model; the decoder's dtype must be the engine's.
      tokenizer: for stop strings only.
      runner: what runs batches; made from the decoder if None.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        decoder: Decoder | None,
        tokenizer: Tokenizer,
        *,
        cache_config: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
        engine_config: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
        runner: Any = None,
    ):
        if runner is None:
            assert decoder is not None, "a decoder or a runner is needed"
            runner = Runner(model_config, decoder, cache_config, engine_config)
        engine_config = fill_chip(model_config, engine_config)
        super().__init__(model_config, cache_config, engine_config, runner)
        self.tokenizer = tokenizer
        self.plans = PlanBuilder(cache_config, engine_config)
        self.prefill_plans = PlanBuilder(cache_config, engine_config, engine_config.max_prefill_partials)

    # Requests.

    def submit(
        self,
        token_ids: Sequence[int],
        *,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        max_pages: int | None = None,
    ) -> Thread:
        """Starts a family, of `max_pages` unique pages at most if that is less than the engine's bound.

        With max_new_tokens = 0 the prompt is prefilled and nothing sampled.

        Raises:
          ValueError: the prompt is empty, holds an id outside the vocabulary, is longer than the context window, or
            can never fit the cache.
        """
        ids = self.check_prompt(token_ids, sampling, max_pages)
        family = Family(self._next_family_id, sampling.seed, max_pages)
        self._next_family_id += 1
        context, matched = self.cache.match_prefix(ids)
        thread = self._new_thread(family, None, (), sampling, context)
        thread.start_position = 0
        thread.prompt_ids = ids
        thread.pending = ids[matched:]
        family.counters.cached_tokens = matched
        self.scheduler.families[family.id] = family
        self.emit(events.SubmitEvent, thread, prompt_ids=tuple(ids))
        self._emit_keys(thread, matched, "cached")
        return thread

    def check_prompt(
        self, token_ids: Sequence[int], sampling: SamplingParams, max_pages: int | None = None
    ) -> list[int]:
        """The prompt's ids, if `submit` takes them; raises ValueError as it does."""
        ids = self._checked_ids(token_ids)
        check(len(ids) > 0, "the prompt is empty: at least 1 token is needed")
        window = self.model_config.max_position
        check(len(ids) <= window, f"the prompt has {len(ids)} tokens, the context window is {window}")
        needed = math.ceil((len(ids) + min(1, sampling.max_new_tokens)) / self.cache.page_size)
        bound = self.scheduler.max_family_pages(Family(self._next_family_id, sampling.seed, max_pages))
        check(needed <= bound, f"the prompt needs {needed} pages, a family may hold {bound}")
        self.check_sampling(sampling)
        return ids

    @property
    def has_work(self) -> bool:
        """Whether some thread wants to run, or has stopped and was not reported yet."""
        return bool(self._stopped or self.scheduler.threads(Status.WAITING, Status.RUNNING))

    def run(self) -> None:
        """Steps until every thread has stopped."""
        while self.has_work:
            self.step()

    def step(self) -> list[Thread]:
        """Schedule, run, postprocess.

        Returns:
          The threads that stopped since the last step, each once a stop.
        """
        started_s = time.perf_counter()
        with self._changing():
            work = self.scheduler.schedule()
            for thread in work.stopped:
                self._note_stop(thread)
            if work.prefill:
                self._run_prefill(work)
            if work.decode:
                batch = self._decode_batch(work)
                self._postprocess(batch, self.runner.decode(batch))
            elif not work.prefill and not work.stopped and self.scheduler.threads(Status.WAITING, Status.RUNNING):
                raise RuntimeError(f"nothing can run: {self.cache.num_available} pages available, {work}")
            self.stats.num_steps += 1
        self._emit_step(started_s)
        stopped = [thread for thread in self._stopped if thread.status is Status.STOPPED]
        self._stopped.clear()
        return stopped

    def warm_up(self) -> int:
        """Compiles every declared bucket, so that nothing compiles later; returns how many programs there are."""
        config = self.config
        for rows in self.row_buckets:
            for items in self.plans.item_buckets(rows):
                plan = self.plans.build([], rows, config.max_threads, items)
                self.runner.decode(self._empty_decode_batch(plan))
        for items in self.prefill_plans.item_buckets(config.prefill_rows):
            plan = self.prefill_plans.build([], config.prefill_rows, config.max_threads, items)
            for chunk in self.chunk_buckets:
                self.runner.prefill(prefill_batch({}, {}, plan, config.max_threads, chunk))
        self.runner.write_pages([0], self.runner.read_pages([0]))  # the null page: nothing is written
        return self.runner.num_compiles

    @property
    def row_buckets(self) -> list[int]:
        """Rows of a decode dispatch: 1, 8, 32, ... up to max_threads."""
        rows = [1]
        while rows[-1] < self.config.max_threads:
            rows.append(min(8 if rows[-1] == 1 else rows[-1] * 4, self.config.max_threads))
        return rows

    @property
    def chunk_buckets(self) -> list[int]:
        """Tokens of a prefill dispatch's rows: a short chunk for flushes and forced text, and the full one."""
        return sorted({min(16, self.config.prefill_chunk), self.config.prefill_chunk})

    # Inside.

    def _run_prefill(self, work: Work) -> None:
        threads = [work.threads[i] for i in work.prefill]
        self._feed(threads, work.prefill, {t.id: t.slot for t in threads if t.slot is not None})

    def _feed(self, threads: Sequence[Thread], counts: dict[int, int], slots: dict[int, int]) -> None:
        """Writes the keys of the first counts[thread.id] pending tokens, whose pages are reserved. Samples nothing."""
        chunk = next(c for c in self.chunk_buckets if c >= max(counts[t.id] for t in threads))
        by_slot = {slots[t.id]: t for t in threads}
        rows = [(slot, t.context) for slot, t in by_slot.items() if t.context is not None]
        try:
            plan = self.prefill_plans.build(rows, self.config.prefill_rows, self.config.max_threads, num_queries=chunk)
        except PlanOverflow:
            if len(threads) == 1:
                raise
            half = len(threads) // 2
            self._feed(threads[:half], counts, slots)
            self._feed(threads[half:], counts, slots)
            return
        self.runner.prefill(prefill_batch(by_slot, counts, plan, self.config.max_threads, chunk))
        self.stats.num_prefill_dispatches += 1
        for thread in threads:
            assert thread.context is not None
            n = counts[thread.id]
            self._advance(thread, thread.pending[:n], "prefill" if thread.status is Status.RUNNING else "flush")
            del thread.pending[:n]
            self.cache.commit_prefix(thread.context)
            thread.family.counters.prefill_tokens += n
            self.stats.prefill_tokens += n

    def _decode_batch(self, work: Work) -> DecodeBatch:
        """The step's decode batch; rows that the largest plan cannot hold wait, the youngest first."""
        by_slot = {t.slot: t for t in (work.threads[i] for i in work.decode) if t.slot is not None}
        while True:
            rows = next(r for r in self.row_buckets if r >= len(by_slot))
            contexts = [(slot, t.context) for slot, t in by_slot.items() if t.context is not None]
            try:
                plan = self.plans.build(contexts, rows, self.config.max_threads)
                return self._make_decode_batch(by_slot, work.decode, plan)
            except PlanOverflow:
                if len(by_slot) == 1:
                    raise
                by_slot = dict(list(by_slot.items())[: (len(by_slot) + 1) // 2])

    def _empty_decode_batch(self, plan: Plan) -> DecodeBatch:
        return self._make_decode_batch({}, {}, plan)

    def _make_decode_batch(self, by_slot: dict, capacity: dict[int, int], plan: Plan) -> DecodeBatch:
        return decode_batch(
            by_slot,
            capacity,
            plan,
            num_slots=self.config.max_threads,
            num_steps=self.config.steps_per_dispatch,
            max_stop_ids=self.config.max_stop_ids,
            eos_ids=self.model_config.eos_ids,
            vocab_size=self.model_config.vocab_size,
        )

    def _postprocess(self, batch: DecodeBatch, result: DecodeResult) -> None:
        self.stats.num_decode_dispatches += 1
        self.stats.num_round_trips += 1
        for row, thread in enumerate(batch.threads):
            assert thread.context is not None
            taken = result.tokens[row] != PADDING_ID
            sampled = [int(token) for token in result.tokens[row][taken]]
            num_fed = int(result.num_fed[row])
            sequence = thread.pending + sampled
            num_forced = min(num_fed, len(thread.pending) - 1)
            self._advance(thread, sequence[:num_fed], "decode")
            thread.pending = sequence[num_fed:]
            thread.family.counters.prefill_tokens += max(0, num_forced)
            first_new = len(thread.token_ids)
            thread.token_ids += sampled
            thread.sampled += [True] * len(sampled)
            if thread.sampling.logprobs:
                thread.logprobs += [float(x) for x in result.logprobs[row][taken]]
            else:
                thread.logprobs += [math.nan] * len(sampled)
            thread.num_sampled += len(sampled)
            thread.budget -= len(sampled)
            self.stats.decode_tokens += len(sampled)
            stop = self._find_stop(thread, first_new)
            kept = thread.token_ids[first_new:]
            if sampled:
                flags, num_dropped = (True,) * len(kept), len(sampled) - len(kept)
                self.emit(events.TokenEvent, thread, token_ids=tuple(kept), sampled=flags, num_dropped=num_dropped)
            if stop is not None:
                if not thread.pending and stop.reason == "stop_id":
                    thread.family.counters.flush_tokens += 1
                    thread.is_flushed = True
                thread.stop = stop
                thread.status = Status.STOPPED
                thread.slot = None
                self.cache.trim(thread.context)
                self._note_stop(thread)

    def _find_stop(self, thread: Thread, first_new: int) -> Stop | None:
        """Why the thread stops now, if it does; tokens beyond a stop string are dropped."""
        params = thread.sampling
        if params.stop and len(thread.token_ids) > first_new:
            since = thread.sampled_since
            found = find_stop(
                self.tokenizer.decode, thread.token_ids[since:], max(first_new, since) - since, params.stop
            )
            if found is not None:
                self._drop_last(thread, len(thread.token_ids) - since - found[0])
                return Stop("stop_string", string=found[1])
        if len(thread.token_ids) > first_new:
            last = thread.token_ids[-1]
            if last in params.stop_ids:
                return Stop("stop_id", token_id=last)
            if not params.ignore_eos and last in self.model_config.eos_ids:
                return Stop("eos", token_id=last)
        if thread.budget == 0 and len(thread.pending) <= 1:
            return Stop("length")
        return None

    def _drop_last(self, thread: Thread, count: int) -> None:
        """Takes back the thread's last sampled tokens, their keys too."""
        if count == 0:
            return
        with_keys = count - len(thread.pending)
        assert thread.context is not None
        assert with_keys >= 0, "a sampled token has keys unless it is the last"
        self.cache.rollback(thread.context, with_keys)
        self._emit_keys(thread, -with_keys, "dropped")
        thread.pending = []
        for values in (thread.token_ids, thread.sampled, thread.logprobs):
            del values[-count:]
        thread.num_sampled -= count
        thread.budget += count
        thread.family.counters.overshoot_tokens += count

    def _advance(self, thread: Thread, token_ids: Sequence[int], reason: events.KeysReason) -> None:
        """Notes that these tokens have keys now."""
        context = thread.context
        assert context is not None
        self.cache.advance(context, token_ids)
        self._emit_keys(thread, len(token_ids), reason)
        if thread.num_to_seal and token_ids:
            thread.num_to_seal -= len(token_ids)
            if thread.num_to_seal == 0:
                if thread.marks:
                    self._mark_context(thread, context)
                else:
                    self.cache.seal(context)
        counters = thread.family.counters
        counters.max_context_tokens = max(counters.max_context_tokens, context.num_tokens)
