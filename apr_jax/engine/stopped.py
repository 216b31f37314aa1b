"""Stopped threads: what is pending gets its keys or the last token loses them, tokens are forced, and they wake."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from apr_jax.config import check
from apr_jax.engine import events
from apr_jax.engine.loop import Loop
from apr_jax.engine.thread import Status, Stop, Thread
from apr_jax.types import SamplingParams


class Taken(NamedTuple):
    """What a thread has lost: its last tokens, whether they were sampled, their log-probabilities."""

    token_ids: list[int]
    sampled: list[bool]
    logprobs: list[float]


class StoppedThreads(Loop):
    """What the primitives do with threads that have stopped."""

    def _settle_mark(self, thread: Thread) -> None:
        """Tells the cache of a mark whose token can get its keys now."""
        if thread.marks:
            self._flush([thread])
            assert thread.context is not None
            self._mark_context(thread, thread.context)
            thread.num_to_seal = 0

    def _suspend(self, thread: Thread, children: list[Thread]) -> None:
        thread.status = Status.FORKED
        thread.stop = None
        thread.num_forks += 1
        thread.children = children
        prompts = tuple(tuple(child.prompt_ids) for child in children if child.prompt_ids)
        ids, max_width = tuple(child.id for child in children), thread.family.max_width
        self.emit(events.ForkEvent, thread, child_ids=ids, prompts=prompts, max_width=max_width)
        for child in children:
            if child.prompt_ids:
                self._emit_keys(child, len(child.prompt_ids) - len(child.pending), "cached")
            if self._begins_held(child):
                child.status, child.stop = Status.STOPPED, Stop("held")
                self.emit(events.StopEvent, child, reason="held")
            elif child.token_ids:
                self._emit_forced(child, child.token_ids)

    def _begins_held(self, child: Thread) -> bool:
        """Whether a new child begins only when siblings have ended or wait."""
        max_width = child.family.max_width
        return max_width is not None and child.ordinal >= max_width

    def _force(self, thread: Thread, ids: Sequence[int]) -> None:
        thread.token_ids += ids
        thread.sampled += [False] * len(ids)
        thread.logprobs += [math.nan] * len(ids)
        thread.pending += ids
        if ids and thread.status is not Status.WAITING:
            self._emit_forced(thread, ids)

    def _check_drop(self, thread: Thread, drop: int) -> None:
        own = len(thread.token_ids) - (thread.joins[-1].at if thread.joins else 0)
        check(0 <= drop <= own, f"{drop} tokens to drop, the thread has {own} behind its last join")

    def _take_back(self, thread: Thread, count: int) -> Taken:
        """A stopped thread loses its last tokens, their keys too; they count as overshoot.

        What comes before them in a segment that is sealed already has to be computed again.
        """
        if count == 0:
            return Taken([], [], [])
        context = thread.context
        assert context is not None
        before = context.num_tokens
        left = count - min(count, len(thread.pending))
        del thread.pending[-count:]
        while left > context.tail_len:
            left -= context.tail_len
            self.cache.rollback(context, context.tail_len)
            self.cache.trim(context)
            again = self.cache.drop_last(context)
            taken = min(left, len(again))
            left -= taken
            thread.pending = again[: len(again) - taken] + thread.pending
            thread.family.counters.reprefill_tokens += len(again) - taken
        self.cache.rollback(context, left)
        self.cache.trim(context)
        taken_back = Taken(thread.token_ids[-count:], thread.sampled[-count:], thread.logprobs[-count:])
        for values in (thread.token_ids, thread.sampled, thread.logprobs):
            del values[-count:]
        thread.is_flushed = False
        thread.family.counters.overshoot_tokens += count
        self._emit_keys(thread, context.num_tokens - before, "dropped")
        self.emit(events.RewindEvent, thread, num_tokens=count)
        return taken_back

    def _give_back(self, thread: Thread, taken: Taken) -> None:
        """What was taken back is the thread's again. Its keys are computed again; listeners hear of forced tokens."""
        count = len(taken.token_ids)
        if count:
            self._force(thread, taken.token_ids)
            thread.sampled[-count:], thread.logprobs[-count:] = taken.sampled, taken.logprobs

    def _emit_forced(self, thread: Thread, ids: Sequence[int]) -> None:
        self.emit(events.TokenEvent, thread, token_ids=tuple(ids), sampled=(False,) * len(ids))

    def _wake(self, thread: Thread, sampling: SamplingParams | None) -> None:
        if sampling is not None:
            thread.sampling = sampling
            thread.budget = sampling.max_new_tokens
            thread.avoided = 0, ()
        thread.sampled_since = len(thread.token_ids)
        thread.is_flushed = False
        thread.stop = None
        thread.status = Status.WAITING

    def _one_each(self, sampling: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
        check(count > 0, "a fork into 0 children, at least 1 is needed")
        params = [sampling] * count if isinstance(sampling, SamplingParams) else list(sampling)
        check(len(params) == count, f"{len(params)} sampling parameters for {count} children")
        for child_params in params:
            self.check_sampling(child_params)
        return params

    def _check_status(self, thread: Thread, wanted: Status) -> None:
        check(
            thread.status is wanted,
            f"thread {thread.id} is {thread.status.value}, must be {wanted.value} for this",
        )

    def _check_may_fork(self, thread: Thread) -> None:
        self._check_status(thread, Status.STOPPED)
        check(not thread.marks, f"thread {thread.id} was marked: it goes on with append before it forks")

    def _unfeed_last(self, thread: Thread) -> None:
        """Takes back the keys of the thread's last token, so that it can be sampled from."""
        context = thread.context
        assert context is not None
        check(
            context.tail_len > 0,
            f"thread {thread.id} has just been sealed: it needs forced tokens to go on with",
        )
        last = context.segments[-1].token_ids[-1]
        self.cache.rollback(context, 1)
        self._emit_keys(thread, -1, "unfed")
        thread.pending = [last]
        thread.family.counters.flush_tokens -= thread.is_flushed
        thread.is_flushed = False

    def _flush(self, threads: Sequence[Thread]) -> None:
        """Feeds what is pending of stopped threads, without sampling, so that their segments can be sealed."""
        while waiting := [thread for thread in threads if thread.pending]:
            group = waiting[: min(self.config.prefill_rows, self.config.max_threads)]
            counts = []
            for thread in group:
                assert thread.context is not None
                room = self.cache.tail_room(thread.context)
                # What a fork carried ends with a segment.
                wanted = thread.num_to_seal or len(thread.pending)
                counts.append(min(wanted, self.config.prefill_chunk, room))
            self.scheduler.claim(group, counts)
            by_id = {thread.id: count for thread, count in zip(group, counts, strict=True)}
            self._feed(group, by_id, {thread.id: slot for slot, thread in enumerate(group)})
            group[0].family.counters.flush_tokens += sum(counts)
            group[0].family.counters.prefill_tokens -= sum(counts)
            for thread in group:
                thread.is_flushed = not thread.pending
