"""Threads that are turned from where they were going: stopped from outside, or sent back to go on otherwise."""

from apr_jax.config import check
from apr_jax.engine import events
from apr_jax.engine.stopped import StoppedThreads
from apr_jax.engine.thread import WANTS_TO_RUN, Status, Stop, StopReason, Thread
from apr_jax.engine.tree import changes_threads
from apr_jax.types import SamplingParams


class Detours(StoppedThreads):
    """`interrupt` and `avoid`, as the primitives of `EngineCore` are."""

    @changes_threads
    def interrupt(self, thread: Thread, reason: StopReason) -> None:
        """Stops a thread where it is, between two steps. Its tokens stay, those without keys too; `step` does not
        report it.

        Raises:
          ValueError: the thread neither waits nor runs.
        """
        check(
            thread.status in WANTS_TO_RUN,
            f"thread {thread.id} is {thread.status.value}, must be waiting or running for this",
        )
        self.scheduler.halt(thread, Stop(reason))
        self.emit(events.StopEvent, thread, reason=reason)

    @changes_threads
    def avoid(self, thread: Thread, count: int, *, sampling: SamplingParams | None = None) -> None:
        """A stopped thread loses its last tokens and goes on otherwise: the first of them is not sampled in that place
        again, nor is what was avoided there before. Anywhere else it may be.

        So a text of several tokens can be kept out of what a model says, where no single token can be banned: let it be
        a stop string, and avoid the tokens that it is in.

        Args:
          count: how many tokens, all of them sampled and behind the thread's last join. They count as overshoot.
          sampling: as in `append`; None keeps parameters and budget, and gives back what the tokens took of it.

        Raises:
          ValueError: the thread has not stopped, or has no so many tokens to lose, or more ids would be banned in that
            place than the engine takes.
        """
        self._check_status(thread, Status.STOPPED)
        self._check_drop(thread, count)
        check(count >= 1 and all(thread.sampled[-count:]), f"{count} tokens to avoid, must be >= 1 and all sampled")
        params = thread.sampling if sampling is None else sampling
        self.check_sampling(params)
        place = len(thread.token_ids) - count
        before = thread.avoided[1] if thread.avoided[0] == place else ()
        ids = (*before, thread.token_ids[place])
        bound = self.config.max_stop_ids
        check(
            len(params.banned_ids) + len(ids) <= bound,
            f"{len(params.banned_ids)} banned and {len(ids)} avoided ids, max_stop_ids (which bounds them) is {bound}",
        )
        since = min(thread.sampled_since, place)
        self._take_back(thread, count)
        thread.num_sampled -= count
        thread.budget += count
        if not thread.pending:
            self._unfeed_end(thread)
        self._wake(thread, sampling)
        thread.avoided = place, ids
        thread.num_avoided += 1
        thread.sampled_since = since  # what is avoided may have begun before the place

    def _unfeed_end(self, thread: Thread) -> None:
        """Takes back keys at the thread's end, so that it can be sampled from: of the last token, or, where a sealed
        segment ends, of all of that, which will end there again.
        """
        context = thread.context
        assert context is not None
        if context.tail_len:
            self._unfeed_last(thread)
            return
        thread.marks = context.mark_index == len(context.segments)
        thread.pending = self.cache.drop_last(context)
        self._emit_keys(thread, -len(thread.pending), "unfed")
        thread.num_to_seal = len(thread.pending)
        thread.family.counters.reprefill_tokens += len(thread.pending) - 1
