"""How threads fork and join: the primitives that every program and strategy is made of. Nothing is ever copied."""

import time
from collections.abc import Sequence

from apr_jax.config import check
from apr_jax.engine import events
from apr_jax.engine.detours import Detours
from apr_jax.engine.joining import join_parts, pages_wanted
from apr_jax.engine.thread import JoinMode, JoinRecord, Status, Thread
from apr_jax.engine.tree import changes_threads
from apr_jax.types import OutOfPages, SamplingParams

JOIN_MODES = ("stitch", "conclusion", "select", "prefill", "splice")


class EngineCore(Detours):
    """Threads over one paged cache: `submit`, `fork`, `spawn`, `append`, `avoid`, `mark`, `join`, `interrupt`, `cancel`
    and `release` change the tree of threads; `step` and `run` make tokens. Every primitive leaves all as it was if it
    raises, but that last tokens of stopped threads may have been fed.
    """

    @changes_threads
    def append(
        self,
        thread: Thread,
        token_ids: Sequence[int] = (),
        *,
        sampling: SamplingParams | None = None,
        drop: int = 0,
    ) -> None:
        """A stopped thread goes on.

        Args:
          token_ids: forced tokens it goes on with; may be empty.
          sampling: new parameters with a budget of their own; None keeps the old ones and what is left of theirs.
          drop: how many of the thread's last tokens the forced ones replace, all of them behind its last join.

        Raises:
          ValueError: the thread has not stopped, or has no so many tokens to drop, or none is forced in their place.
        """
        self._check_status(thread, Status.STOPPED)
        begins = thread.is_held
        ids = self._checked_ids(token_ids)
        if sampling is not None:
            self.check_sampling(sampling)
        self._check_drop(thread, drop)
        check(not drop or (bool(ids) and not thread.marks), "tokens are dropped only where others are forced instead")
        self._take_back(thread, drop)
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
        if begins:
            thread.sampled_since = 0  # as of children that begin with their fork

    @changes_threads
    def fork(
        self,
        thread: Thread,
        token_lists: Sequence[Sequence[int]],
        *,
        sampling: SamplingParams | Sequence[SamplingParams],
        drop: int = 0,
        carry: bool = False,
    ) -> list[Thread]:
        """The thread is suspended and children continue its context, each starting with its own forced tokens.

        Args:
          thread: one that has stopped. Its last token is computed once for all children, or, if some child has no
            forced token, by every child at its own position.
          token_lists: forced tokens of each child; may be empty. Children that are held (`Family.max_width`) do not
            have theirs yet.
          sampling: one for all children or one each.
          drop: how many of the thread's last tokens are taken back first, so that neither it nor its children hold
            them: all of them behind its last join. Every child then needs forced tokens.
          carry: every child computes the thread's last token even if all have forced tokens, so that the thread
            keeps it for a join that selects none of them.

        Returns:
          The children, in order; those that find no room wait for their turn.

        Raises:
          ValueError: no child, or the thread has not stopped, or was marked and has not gone on, or has no so many
            tokens to drop.
          OutOfPages: the children cannot fit the family's bound.
        """
        self._check_may_fork(thread)
        lists = [self._checked_ids(ids) for ids in token_lists]
        params = self._one_each(sampling, len(lists))
        bound = self.scheduler.max_family_pages(thread.family)
        needed = self.scheduler.family_pages(thread.family) + len(lists)  # a page a child, at least
        if needed > bound:
            raise OutOfPages(needed, bound, "the family's bound")
        self._check_drop(thread, drop)
        check(not drop or (all(lists) and not carry), "children of a fork that drops tokens need forced ones")
        carried: list[int] = []
        if all(lists) and not carry:
            taken = self._take_back(thread, drop)
            try:
                self._flush([thread])
            except OutOfPages:
                self._give_back(thread, taken)
                raise
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
            if not self._begins_held(child):
                self._force(child, ids)
            children.append(child)
        thread.carried = carried
        self._suspend(thread, children)
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
          OutOfPages: the prompts cannot fit the family's bound.
        """
        self._check_may_fork(thread)
        lists = [self._checked_ids(ids) for ids in prompts]
        window = self.model_config.max_position
        for ids in lists:
            check(0 < len(ids) <= window, f"a spawned prompt has {len(ids)} tokens, must be in [1, {window}]")
        params = self._one_each(sampling, len(lists))
        contexts = [self.cache.match_prefix(ids)[0] for ids in lists]
        bound = self.scheduler.max_family_pages(thread.family)
        needed = self.scheduler.pages_with_prompts(thread.family, lists, contexts)
        if needed > bound:
            for context in contexts:
                self.cache.release(context)
            raise OutOfPages(needed, bound, "the family's bound")
        children = []
        for ordinal, (context, ids, child_params) in enumerate(zip(contexts, lists, params, strict=True)):
            matched = context.num_tokens
            path = (*thread.path, (thread.num_forks, ordinal))
            child = self._new_thread(thread.family, thread, path, child_params, context)
            child.start_position = 0
            child.prompt_ids = ids
            child.pending = ids[matched:]
            thread.family.counters.cached_tokens += matched
            children.append(child)
        self._suspend(thread, children)
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
          children: the stopped children to join, in order. `select` of none takes the fork back: the thread goes on
            from where it was.
          mode: what the thread's context becomes (`stitch`, `conclusion`, `select`, `prefill`, `splice`). With
            `splice`, `tokens` is the text that the children return.
          tokens: forced tokens that the thread goes on with; may be empty for `select` only.
          sampling: as in `append`.

        Raises:
          ValueError: unknown mode, a child that has not stopped or is not the thread's, several for `select`, no
            tokens where they are needed.
          OutOfPages: a child's last token needs a page that cannot be had, or the thread would read more pages
            than the pool has (children that said the same share pages, but they are read for each of them).
        """
        check(mode in JOIN_MODES, f"join mode {mode!r} is not one of {JOIN_MODES}")
        self._check_status(thread, Status.FORKED)
        for child in children:
            check(child.parent is thread, f"thread {child.id} is no child of thread {thread.id}")
            self._check_status(child, Status.STOPPED)
            check(not child.is_held, f"thread {child.id} is held: it has not begun")
        check(mode != "select" or len(children) <= 1, f"select joins 1 child, not {len(children)}")
        ids = self._checked_ids(tokens)
        check(bool(ids) or mode == "select", f"a join by {mode} needs tokens to go on with")
        if sampling is not None:
            self.check_sampling(sampling)
        assert thread.context is not None
        if mode != "splice":
            needed, total = self.scheduler.pages_read(thread), self.cache.pool.total
            needed += pages_wanted(self.cache, children, mode)
            if needed > total:
                raise OutOfPages(needed, total, "one thread's context")
        handed: list[int] = []
        if mode == "select" and not ids and children:
            if not children[0].pending:
                self._unfeed_last(children[0])
            handed, children[0].pending = children[0].pending, []
        elif mode == "select" and not ids and not thread.pending and not thread.carried and thread.context.tail_len:
            self._unfeed_last(thread)  # behind a spawn
        elif mode == "prefill":
            self._flush(children[:1])
        elif mode != "splice":
            self._flush(children)
            for child in children:
                self._settle_mark(child)
        started = time.perf_counter()
        parts, position, again = join_parts(self.cache, thread, children, mode)
        self.cache.join(thread.context, parts, position)
        seconds = time.perf_counter() - started
        # Tokens that the fork carried come with a child's segments, if one is joined.
        # Behind a spawn, the thread's own last token may still be pending.
        thread.pending += (handed if handed or any(parts) else thread.carried) + again
        thread.carried = []
        dropped = tuple(child for child in thread.children if child not in children)
        record = JoinRecord(len(thread.token_ids), tuple(children), mode, dropped)
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
