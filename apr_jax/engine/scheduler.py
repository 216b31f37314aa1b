"""Who runs next: admission, slots, page reservations. Knows threads, pages and budgets, never what tokens mean."""

import dataclasses
from collections.abc import Callable

from apr_jax.cache.cache import KVCache
from apr_jax.cache.context import Segment
from apr_jax.config import EngineConfig
from apr_jax.engine.preemption import Preemption
from apr_jax.engine.thread import WANTS_TO_RUN, Family, Status, Stop, Thread
from apr_jax.types import OutOfPages


@dataclasses.dataclass
class Work:
    """One engine step: tokens to prefill and to decode by thread id, and threads that stopped without running."""

    prefill: dict[int, int] = dataclasses.field(default_factory=dict)
    decode: dict[int, int] = dataclasses.field(default_factory=dict)
    threads: dict[int, Thread] = dataclasses.field(default_factory=dict)
    stopped: list[Thread] = dataclasses.field(default_factory=list)
    newcomer_waits: bool = False  # for pages


class Scheduler(Preemption):
    """Decides what a step runs.

    Args:
      max_position: the model's context window.
      read_pages, write_pages, on_preempt: as `Preemption` has them.
    """

    def __init__(
        self,
        config: EngineConfig,
        cache: KVCache,
        max_position: int,
        read_pages: Callable,
        write_pages: Callable,
        on_preempt: Callable[[Family, Thread | None, int, bool], None],
    ):
        super().__init__(config, cache, read_pages, write_pages, on_preempt)
        self.max_position = max_position

    # One step.

    def schedule(self) -> Work:
        """Admits waiting threads, reserves the pages that the step may need, and picks what it runs."""
        work = Work()
        slots = self._free_slots()
        for thread in self.threads(*WANTS_TO_RUN):
            if thread.status not in WANTS_TO_RUN:
                continue  # preempted or stopped while room was made for an older one
            if thread.budget == 0 and len(thread.pending) <= 1:
                self._stop(work, thread, Stop("prefilled"))
            elif self._room_in_window(thread) <= 0:
                self._stop(work, thread, Stop("context"))
            elif self.pages_read(thread) > self.cache.pool.total:
                self._stop(work, thread, Stop("pages"))  # more than a plan may have to hold
            elif self._admit(work, thread, slots):
                self._pick(work, thread)
        # Making room for an older thread may have taken a younger one's slot after it was picked.
        for chosen in (work.prefill, work.decode):
            for thread_id in [i for i in chosen if work.threads[i].status is not Status.RUNNING]:
                del chosen[thread_id]
        return work

    def _free_slots(self) -> list[int]:
        taken = {t.slot for t in self.threads(Status.RUNNING)}
        return [slot for slot in reversed(range(self.config.max_threads)) if slot not in taken]

    def _room_in_window(self, thread: Thread) -> int:
        """Tokens that still fit the model's context window."""
        assert thread.context is not None
        return self.max_position - thread.context.next_position

    def _admit(self, work: Work, thread: Thread, slots: list[int]) -> bool:
        """Gives the thread a slot and brings its segments to the device; whether it runs now."""
        if thread.status is Status.RUNNING:
            return True
        assert thread.context is not None
        if thread.family.yields and self._has_its_share(thread.family, bool(slots)):
            return False
        missing = [s for s in thread.context.segments if s.swapped]
        if not slots and not self._free_a_slot(thread, missing, slots):
            return False
        if not self._is_started(thread.family):
            # Nobody is preempted for a newcomer, and no later one overtakes it.
            work.newcomer_waits = work.newcomer_waits or not self._fits_beside_others(thread)
            if work.newcomer_waits:
                return False
        if missing and not self._has_headroom(thread, missing):
            return False  # it would be moved out again at once
        if missing and not self._bring_back(work, thread):
            return False
        thread.slot = slots.pop()
        thread.status = Status.RUNNING
        return True

    # Load, for families that yield.

    def room_to_fork(self, family: Family) -> int:
        """How many children of a fork could run side by side now: on free rows, within an even share of all rows, and
        with the pages that everyone needs for a dispatch. Every family counts as one row at least, as it goes on.
        """
        wanting = {f.id: sum(t.status in WANTS_TO_RUN for t in f.threads) for f in self.families.values()}
        own = wanting.pop(family.id, 0)
        taken = own + sum(max(1, count) for count in wanting.values())
        each = 1 + self.config.steps_per_dispatch // self.cache.page_size
        pages = self.cache.num_available // each - min(taken, self.config.max_threads)
        bound = self.max_family_pages(family) - self.family_pages(family)
        return max(0, min(self.config.max_threads - taken, self._even_share() - own, pages, bound))

    def _even_share(self) -> int:
        """Rows of each family, rounded up: what is left over goes to those who come first."""
        return -(-self.config.max_threads // max(1, len(self.families)))

    def _has_its_share(self, family: Family, has_slots: bool) -> bool:
        """Whether a yielding family waits with another thread: it has a row, and no more are its due or free."""
        num_running = sum(t.status is Status.RUNNING for t in family.threads)
        return num_running > 0 and (num_running >= self._even_share() or not has_slots)

    def _free_a_slot(self, thread: Thread, missing: list[Segment], slots: list[int]) -> bool:
        """A fork's children do not wait for a younger family's end: the youngest running family steps back.

        It stays where it is if the thread could not run all the same, for want of pages.
        """
        running = self.threads(Status.RUNNING)
        if not running or running[-1].family.id <= thread.family.id or not self._is_started(thread.family):
            return False
        youngest = running[-1].family
        at_bound = self.family_pages(thread.family) + self._next_page(thread) > self.max_family_pages(thread.family)
        if at_bound or not self._has_headroom(thread, missing, leaving=youngest):
            return False
        slots.extend(t.slot for t in running if t.family is youngest and t.slot is not None)
        self._step_back(youngest, [thread])
        return True

    def _has_headroom(self, thread: Thread, missing: list[Segment], leaving: Family | None = None) -> bool:
        """Whether there are pages for the thread to run, now or once the family `leaving` has stepped back.

        With missing segments to bring back, everyone else running must be able to go on for a dispatch as well.
        """
        if not self._older_wants_to_run(thread):
            return True  # room is made for the oldest
        size = self.cache.page_size
        available = self.cache.num_available
        if leaving is not None:
            available += self._pages_given_up(leaving, [thread])
        if not missing:
            return self._next_page(thread) <= available
        back = self.cache.num_pages_of(missing)
        running = 1 + sum(t.family is not leaving for t in self.threads(Status.RUNNING))
        return back + running * (1 + self.config.steps_per_dispatch // size) <= available

    def _next_page(self, thread: Thread) -> int:
        """Pages that a waiting thread takes with its next token, 0 or 1; it holds none in reserve."""
        assert thread.context is not None
        return int(thread.context.tail_len % self.cache.page_size == 0)

    def _is_started(self, family: Family) -> bool:
        return any(t.context is not None and t.context.num_tokens > 0 for t in family.threads)

    def _fits_beside_others(self, thread: Thread) -> bool:
        assert thread.context is not None
        size = self.cache.page_size
        needed = -(-len(thread.pending) // size) + 1
        others_run = any(t.family is not thread.family for t in self.threads(Status.RUNNING))
        return needed <= self.cache.num_available or not (others_run or self._older_wants_to_run(thread))

    def _pick(self, work: Work, thread: Thread) -> None:
        """Reserves pages for the thread's part of this step and adds it to the work."""
        unfed = len(thread.pending)
        prefills = unfed - 1 > self.config.steps_per_dispatch // 2 or thread.budget == 0
        if prefills and len(work.prefill) >= self.config.prefill_rows:
            return  # its turn comes with the next step
        if prefills:
            wanted = min(unfed - 1, self.config.prefill_chunk)
        else:
            # The last sampled token is fed only if it is a stop that is drained.
            wanted = min(self.config.steps_per_dispatch, unfed + thread.budget)
        if thread.num_to_seal:
            wanted = min(wanted, thread.num_to_seal)  # then the tail is sealed
        granted = self.reserve(work, thread, min(wanted, self._room_in_window(thread)))
        if granted:
            (work.prefill if prefills else work.decode)[thread.id] = granted
            work.threads[thread.id] = thread

    # Pages.

    def reserve(self, work: Work, thread: Thread, num_tokens: int) -> int:
        """Makes the thread's tail hold num_tokens more, or as many as its tail and the pool allow.

        Returns:
          The number of tokens, 0 if the thread stepped back or stopped instead.
        """
        context = thread.context
        assert context is not None and num_tokens > 0
        num_tokens = min(num_tokens, self.cache.tail_room(context))
        bound = self.max_family_pages(thread.family)
        while self.family_pages(thread.family) + self.cache.pages_needed(context, num_tokens) > bound:
            if num_tokens == 1:
                self._stop(work, thread, Stop("pages"))
                return 0
            num_tokens = max(1, num_tokens // 2)
        while True:
            try:
                self.cache.reserve(context, num_tokens)
                return num_tokens
            except OutOfPages:
                if self._evict_younger(thread) or self._evict_idle(thread):
                    continue
                if num_tokens > 1:
                    num_tokens = max(1, num_tokens // 2)
                elif self._older_wants_to_run(thread):
                    self._step_back(thread.family)
                    return 0
                elif not self._evict_own([thread]):
                    self._stop(work, thread, Stop("pages"))
                    return 0

    def _bring_back(self, work: Work, thread: Thread) -> bool:
        """Brings the thread's segments to the device, making room for them; whether they fit."""
        while True:
            try:
                self._write_back(thread)
                return True
            except OutOfPages:
                if self._evict_younger(thread) or self._evict_idle(thread):
                    continue
                if self._older_wants_to_run(thread):
                    return False
                if not self._evict_own([thread]):
                    self._stop(work, thread, Stop("pages"))
                    return False

    def _stop(self, work: Work, thread: Thread, stop: Stop) -> None:
        self.halt(thread, stop)
        work.stopped.append(thread)

    def halt(self, thread: Thread, stop: Stop) -> None:
        """A thread that wanted to run has stopped: it keeps its pages, but for those in reserve."""
        assert thread.context is not None
        self.cache.trim(thread.context)
        thread.slot = None
        thread.status = Status.STOPPED
        thread.stop = stop
