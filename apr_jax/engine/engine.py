"""How threads fork and join: the primitives that every program and strategy is made of. Nothing is ever copied."""

import math
import time
from collections.abc import Sequence

from apr_jax.cache.context import Segment, marked_segments, own_segments
from apr_jax.config import check
from apr_jax.engine import events
from apr_jax.engine.loop import Loop
from apr_jax.engine.thread import JoinMode, JoinRecord, Status, Thread
from apr_jax.engine.tree import changes_threads
from apr_jax.types import OutOfPages, SamplingParams

JOIN_MODES = ("stitch", "conclusion", "select", "prefill", "splice")


class EngineCore(Loop):
    """Threads over one paged cache: `submit`, `fork`, `spawn`, `append`, `mark`, `join`, `cancel` and `release`
    change the tree of threads; `step` and `run` make tokens. Every primitive leaves all as it was if it raises, but
    that last tokens of stopped threads may have been fed.
    """

    @changes_threads
    def append(self, thread: Thread, token_ids: Sequence[int] = (), *, sampling: SamplingParams | None = None) -> None:
        """A stopped thread goes on.

        Args:
          token_ids: forced tokens it goes on with; may be empty.
          sampling: new parameters with a budget of their own; None keeps the old ones and what is left of theirs.

        Raises:
          ValueError: the thread has not stopped.
        """
        self._check_status(thread, Status.STOPPED)
        ids = self._checked_ids(token_ids)
        if sampling is not None:
            self._check_sampling(sampling)
        if thread.marks and ids:
            self._settle_mark(thread)
        if not ids and not thread.pending:
            self._unfeed_last(thread)
        if thread.marks:  # the marker is sampled from, so it gets its keys, in a segment of its own, as it runs
            assert thread.context is not None
            self.cache.seal(thread.context)
            thread.num_to_seal = len(thread.pending)
        self._force(thread, ids)
        self._wake(thread, sampling)

    @changes_threads
    def fork(
        self,
        thread: Thread,
        token_lists: Sequence[Sequence[int]],
        *,
        sampling: SamplingParams | Sequence[SamplingParams],
    ) -> list[Thread]:
        """The thread is suspended and children continue its context, each starting with its own forced tokens.

        Args:
          thread: one that has stopped. Its last token is computed once for all children, or, if some child has no
            forced token, by every child at its own position.
          token_lists: forced tokens of each child; may be empty.
          sampling: one for all children or one each.

        Returns:
          The children, in order; those that find no room wait for their turn.

        Raises:
          ValueError: no child, or the thread has not stopped, or was marked and has not gone on.
          OutOfPages: the children cannot fit the family's bound.
        """
        self._check_status(thread, Status.STOPPED)
        check(not thread.marks, f"thread {thread.id} was marked: it goes on with append before it forks")
        lists = [self._checked_ids(ids) for ids in token_lists]
        params = self._one_each(sampling, len(lists))
        bound = self.scheduler.max_family_pages
        needed = self.scheduler.family_pages(thread.family) + len(lists)  # a page a child, at least
        if needed > bound:
            raise OutOfPages(needed, bound, "the family's bound")
        carried: list[int] = []
        if all(lists):
            self._flush([thread])
        else:
            if not thread.pending:
                self._unfeed_last(thread)
            carried, thread.pending = thread.pending, []
        assert thread.context is not None
        contexts = self.cache.fork(thread.context, len(lists))
        children = []
        for ordinal, (context, ids, child_params) in enumerate(zip(contexts, lists, params, strict=True)):
            path = (*thread.path, (thread.num_forks, ordinal))
            child = self._new_thread(thread.family, thread, path, child_params, context)
            child.start_position = context.next_position + len(carried)
            child.pending = list(carried)
            child.num_to_seal = len(carried)
            self._force(child, ids)
            children.append(child)
        thread.carried = carried
        self._suspend(thread, children, spawned=False)
        return children

    @changes_threads
    def spawn(
        self,
        thread: Thread,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingParams | Sequence[SamplingParams],
    ) -> list[Thread]:
        """Like `fork`, but each child starts from a context of its own that holds its prompt only.

        Raises:
          ValueError: a prompt is empty or longer than the context window, or the thread has not stopped.
        """
        self._check_status(thread, Status.STOPPED)
        check(not thread.marks, f"thread {thread.id} was marked: it goes on with append before it forks")
        lists = [self._checked_ids(ids) for ids in prompts]
        window = self.model_config.max_position
        for ids in lists:
            check(0 < len(ids) <= window, f"a spawned prompt has {len(ids)} tokens, must be in [1, {window}]")
        params = self._one_each(sampling, len(lists))
        children = []
        for ordinal, (ids, child_params) in enumerate(zip(lists, params, strict=True)):
            context, matched = self.cache.match_prefix(ids)
            path = (*thread.path, (thread.num_forks, ordinal))
            child = self._new_thread(thread.family, thread, path, child_params, context)
            child.start_position = 0
            child.prompt_ids = ids
            child.pending = ids[matched:]
            thread.family.counters.cached_tokens += matched
            children.append(child)
        self._suspend(thread, children, spawned=True)
        return children

    def mark(self, thread: Thread) -> None:
        """What a stopped thread says after its last token is its conclusion: the span a `conclusion` join keeps.

        It goes on with `append`.
        """
        self._check_status(thread, Status.STOPPED)
        thread.marks = True

    @changes_threads
    def join(
        self,
        thread: Thread,
        children: Sequence[Thread],
        *,
        mode: JoinMode = "stitch",
        tokens: Sequence[int] = (),
        sampling: SamplingParams | None = None,
    ) -> None:
        """Children end and the thread goes on. All the thread's children are released; those not joined cancelled.

        Args:
          thread: one that has forked.
          children: the stopped children to join, in order.
          mode: what the thread's context becomes (`stitch`, `conclusion`, `select`, `prefill`, `splice`). With
            `splice`, `tokens` is the text that the children return.
          tokens: forced tokens that the thread goes on with; may be empty for `select` only.
          sampling: as in `append`.

        Raises:
          ValueError: unknown mode, a child that has not stopped or is not the thread's, no child or several for
            `select`, no tokens where they are needed.
          OutOfPages: a child's last token needs a page that cannot be had, or the thread would read more pages
            than the pool has (children that said the same share pages, but they are read for each of them).
        """
        check(mode in JOIN_MODES, f"join mode {mode!r} is not one of {JOIN_MODES}")
        self._check_status(thread, Status.FORKED)
        for child in children:
            check(child.parent is thread, f"thread {child.id} is no child of thread {thread.id}")
            self._check_status(child, Status.STOPPED)
        check(mode != "select" or len(children) == 1, f"select joins 1 child, not {len(children)}")
        ids = self._checked_ids(tokens)
        check(bool(ids) or mode == "select", f"a join by {mode} needs tokens to go on with")
        if sampling is not None:
            self._check_sampling(sampling)
        assert thread.context is not None
        self._check_pages_read(thread, children, mode)
        handed: list[int] = []
        if mode == "select" and not ids:
            if not children[0].pending:
                self._unfeed_last(children[0])
            handed, children[0].pending = children[0].pending, []
        elif mode == "prefill":
            self._flush(children[:1])
        elif mode != "splice":
            self._flush(children)
            for child in children:
                self._settle_mark(child)
        started = time.perf_counter()
        parts, position, again = self._parts(thread, children, mode)
        self.cache.join(thread.context, parts, position)
        seconds = time.perf_counter() - started
        # Tokens that the fork carried come with a child's segments, if one is joined.
        # Behind a spawn, the thread's own last token may still be pending.
        thread.pending += (handed if handed or any(parts) else thread.carried) + again
        thread.carried = []
        record = JoinRecord(len(thread.token_ids), tuple(children), mode)
        thread.joins.append(record)
        for child in thread.children:
            if not child.is_done:
                self._end(child, Status.FINISHED if child in children else Status.CANCELLED)
        thread.children = []
        counters = thread.family.counters
        counters.join_s += seconds
        counters.reprefill_tokens += len(again)
        self.emit(
            events.JoinEvent,
            thread,
            child_ids=tuple(child.id for child in children),
            mode=mode,
            num_segments=len(thread.context.segments),
            seconds=seconds,
        )
        self._force(thread, ids)
        self._wake(thread, sampling)

    # Inside.

    def _check_pages_read(self, thread: Thread, children: Sequence[Thread], mode: JoinMode) -> None:
        if mode == "splice":
            return
        needed, bound = self.scheduler.pages_read(thread), self.cache.pool.total
        for child in children[:1] if mode == "prefill" else children:
            assert child.context is not None
            wanted = marked_segments(child.context) if mode == "conclusion" else own_segments(child.context)
            needed += self.cache.num_pages_of(wanted)
        if needed > bound:
            raise OutOfPages(needed, bound, "one thread's context")

    def _parts(
        self, thread: Thread, children: Sequence[Thread], mode: JoinMode
    ) -> tuple[list[list[Segment]], int, list[int]]:
        """What each child contributes: segments, the thread's next position, and tokens to be computed again."""
        assert thread.context is not None
        position = thread.context.next_position
        if mode == "splice":
            return [], position, []
        contexts = []
        for child in children[:1] if mode == "prefill" else children:
            assert child.context is not None
            self.cache.seal(child.context)
            contexts.append(child.context)
        parts = [own_segments(context) for context in contexts]
        # Each child begins with the tokens that the fork carried; the first child's are enough.
        # A child that never ran may hand them on unfed.
        num_fed = [max(0, len(thread.carried) - child.num_to_seal) for child in children[: len(parts)]]
        firsts = [_split_at(part, n) for part, n in zip(parts, num_fed, strict=True)]
        if mode == "conclusion":
            ends = [marked_segments(context) for context in contexts]
            firsts = [(f, [s for s in rest if s in end]) for (f, rest), end in zip(firsts, ends, strict=True)]
        parts = [rest if i else first + rest for i, (first, rest) in enumerate(firsts)]
        if mode in ("select", "prefill"):
            position = contexts[0].next_position if contexts else position
        else:
            position = max([position, *(context.next_position for context in contexts)])
        again = [token for child in children[1:] for token in self._text_ids(child)] if mode == "prefill" else []
        return parts, position, again

    def _settle_mark(self, thread: Thread) -> None:
        """Tells the cache of a mark whose token can get its keys now."""
        if thread.marks:
            self._flush([thread])
            assert thread.context is not None
            self.cache.mark(thread.context)
            thread.marks, thread.num_to_seal = False, 0

    def _text_ids(self, thread: Thread) -> list[int]:
        """The thread's tokens with those of the children it joined, in the order of the text."""
        ids, at = [], 0
        for record in thread.joins:
            ids += thread.token_ids[at : record.at]
            for child in record.children if record.mode != "splice" else ():
                ids += self._text_ids(child)
            at = record.at
        return ids + thread.token_ids[at:]

    def _suspend(self, thread: Thread, children: list[Thread], spawned: bool) -> None:
        thread.status = Status.FORKED
        thread.stop = None
        thread.num_forks += 1
        thread.children = children
        self.emit(events.ForkEvent, thread, child_ids=tuple(child.id for child in children), spawned=spawned)
        for child in children:
            if child.token_ids:
                self._emit_forced(child, child.token_ids)

    def _force(self, thread: Thread, ids: Sequence[int]) -> None:
        thread.token_ids += ids
        thread.sampled += [False] * len(ids)
        thread.logprobs += [math.nan] * len(ids)
        thread.pending += ids
        if ids and thread.status is not Status.WAITING:
            self._emit_forced(thread, ids)

    def _emit_forced(self, thread: Thread, ids: Sequence[int]) -> None:
        self.emit(events.TokenEvent, thread, token_ids=tuple(ids), sampled=(False,) * len(ids))

    def _wake(self, thread: Thread, sampling: SamplingParams | None) -> None:
        if sampling is not None:
            thread.sampling = sampling
            thread.budget = sampling.max_new_tokens
        thread.sampled_since = len(thread.token_ids)
        thread.stop = None
        thread.status = Status.WAITING

    def _one_each(self, sampling: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
        check(count > 0, "a fork into 0 children, at least 1 is needed")
        params = [sampling] * count if isinstance(sampling, SamplingParams) else list(sampling)
        check(len(params) == count, f"{len(params)} sampling parameters for {count} children")
        for child_params in params:
            self._check_sampling(child_params)
        return params

    def _check_status(self, thread: Thread, wanted: Status) -> None:
        check(
            thread.status is wanted,
            f"thread {thread.id} is {thread.status.value}, must be {wanted.value} for this",
        )

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
        thread.pending = [last]

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


def _split_at(segments: list[Segment], num_tokens: int) -> tuple[list[Segment], list[Segment]]:
    """The segments that hold the first num_tokens, and the rest; a segment's end lies there."""
    end = 0
    while num_tokens > 0:
        num_tokens -= segments[end].num_tokens
        end += 1
    assert num_tokens == 0, "carried tokens are sealed apart"
    return segments[:end], segments[end:]
