"""Who runs next: admission, page reservations, preemption. Knows threads, pages and budgets, never what tokens mean.

Only RUNNING threads hold a slot, and all segments of a running thread are on the device. Everything else may be in
host memory: a segment that no running thread reads can be copied out, keeps its identity, and comes back once for
all its readers.

When pages run out for a thread, room is made in this order, until it fits:
  1. the youngest younger family gives up everything, then the next;
  2. older families of which no thread wants to run give up their segments;
  3. if an older family wants to run, the thread's own family steps back whole;
  4. else the family is the oldest: its other threads give up what only they read, the youngest first;
  5. the thread stops with reason `pages`.
So the oldest family that wants to run always does, and nothing waits for ever.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from apr_jax.cache.cache import KVCache
from apr_jax.cache.context import Segment
from apr_jax.config import EngineConfig
from apr_jax.engine.thread import Family, Status, Stop, Thread
from apr_jax.types import OutOfPages

WANTS_TO_RUN = (Status.WAITING, Status.RUNNING)


@dataclasses.dataclass
class Work:
    """One engine step: tokens to prefill and to decode by thread id, and threads that stopped without running."""

    prefill: dict[int, int] = dataclasses.field(default_factory=dict)
    decode: dict[int, int] = dataclasses.field(default_factory=dict)
    threads: dict[int, Thread] = dataclasses.field(default_factory=dict)
    stopped: list[Thread] = dataclasses.field(default_factory=list)
    newcomer_waits: bool = False  # for pages


class Scheduler:
    """Decides what a step runs.

    Args:
      read_pages: page ids -> host data; write_pages: (page ids, data) -> None. The device's side of a preemption.
      on_preempt: told (family, thread or None for all of it, pages moved, resumed).
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
        self.config = config
        self.cache = cache
        self.max_position = max_position
        self.families: dict[int, Family] = {}
        self._read_pages = read_pages
        self._write_pages = write_pages
        self._on_preempt = on_preempt

    @property
    def max_family_pages(self) -> int:
        total = self.cache.pool.total
        return total if self.config.max_family_pages is None else min(self.config.max_family_pages, total)

    def threads(self, *statuses: Status) -> list[Thread]:
        """Threads in these states, oldest family first, then oldest thread."""
        return [t for f in self.families.values() for t in f.threads if t.status in statuses]

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
        if not slots and not self._free_a_slot(thread, slots):
            return False
        assert thread.context is not None
        if not self._is_started(thread.family):
            # Nobody is preempted for a newcomer, and no later one overtakes it.
            work.newcomer_waits = work.newcomer_waits or not self._fits_beside_others(thread)
            if work.newcomer_waits:
                return False
        missing = [s for s in thread.context.segments if s.swapped]
        if missing and not self._has_headroom(thread, missing):
            return False  # it would be moved out again at once
        if missing and not self._bring_back(work, thread):
            return False
        thread.slot = slots.pop()
        thread.status = Status.RUNNING
        return True

    def _free_a_slot(self, thread: Thread, slots: list[int]) -> bool:
        """A fork's children do not wait for a younger family's end: the youngest running family steps back."""
        running = self.threads(Status.RUNNING)
        if not running or running[-1].family.id <= thread.family.id or not self._is_started(thread.family):
            return False
        youngest = running[-1].family
        slots.extend(t.slot for t in running if t.family is youngest and t.slot is not None)
        self._step_back(youngest)
        return True

    def _has_headroom(self, thread: Thread, missing: list[Segment]) -> bool:
        """Whether, with the missing segments back, everyone running can go on for a dispatch beside this thread."""
        if not self._older_wants_to_run(thread):
            return True  # room is made for the oldest
        size = self.cache.page_size
        back = sum(-(-len(s.token_ids) // size) for s in missing)
        running = len(self.threads(Status.RUNNING)) + 1
        return back + running * (1 + self.config.steps_per_dispatch // size) <= self.cache.num_available

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
        bound = self.max_family_pages
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

    def claim(self, threads: Sequence[Thread], num_tokens: Sequence[int]) -> None:
        """Between steps: brings stopped threads of one family to the device with pages for num_tokens more each.

        Raises:
          OutOfPages: they do not fit, though everything else was moved out.
        """
        for thread, count in zip(threads, num_tokens, strict=True):
            context = thread.context
            assert context is not None
            while True:
                try:
                    self._write_back(thread)
                    self.cache.reserve(context, count)
                    break
                except OutOfPages:
                    others = [f for f in self.families.values() if f is not thread.family]
                    if not any(self._step_back(f, threads) for f in reversed(others)) and not self._evict_own(threads):
                        raise

    def family_pages(self, family: Family) -> int:
        """Unique pages that the family's contexts hold, those in host memory counted."""
        size = self.cache.page_size
        return sum(max(len(s.pages), -(-len(s.token_ids) // size)) for s in _unique_segments(family.live))

    def pages_read(self, thread: Thread) -> int:
        """Pages that a token of the thread reads: those of a segment that it holds several times count each time."""
        assert thread.context is not None
        return self.cache.num_pages_of(thread.context.segments)

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

    def _write_back(self, thread: Thread) -> None:
        """Copies the thread's segments that are in host memory to fresh pages. Raises OutOfPages, nothing changed."""
        assert thread.context is not None
        missing = [s for s in thread.context.segments if s.swapped]
        moved = self.cache.swap_in(missing)
        for segment, page_ids in moved:
            self._write_pages(page_ids, segment.host_data)
            self.cache.finish_swap_in(segment)
        if moved:
            self._on_preempt(thread.family, thread, sum(len(page_ids) for _, page_ids in moved), True)

    def _evict_younger(self, thread: Thread) -> bool:
        """The youngest younger family that holds pages on the device gives them all up; whether one did."""
        for family in reversed(self.families.values()):
            if family.id <= thread.family.id:
                return False
            if self._step_back(family, [thread]):
                return True
        return False

    def _evict_idle(self, thread: Thread) -> bool:
        """An older family of which no thread wants to run gives up its pages; whether one did."""
        for family in self.families.values():
            if family.id >= thread.family.id:
                return False
            idle = not any(t.status in WANTS_TO_RUN for t in family.threads)
            if idle and self._step_back(family, [thread]):
                return True
        return False

    def _evict_own(self, kept: Sequence[Thread]) -> bool:
        """The youngest other thread of the family gives up what only it reads; whether one did."""
        for other in reversed(kept[0].family.live):
            if other in kept:
                continue
            before = self.cache.num_available
            was_running = other.status is Status.RUNNING
            if was_running:
                self._lose_slot(other)
            self._move_out([other], kept)
            moved = self.cache.num_available - before
            if moved or was_running:
                self._on_preempt(other.family, other, moved, False)
            if moved:
                return True
        return False

    def _older_wants_to_run(self, thread: Thread) -> bool:
        for family in self.families.values():
            if family is thread.family:
                return False
            if any(t.status in WANTS_TO_RUN for t in family.threads):
                return True
        return False

    def _step_back(self, family: Family, kept: Sequence[Thread] = ()) -> int:
        """The whole family loses its slots and what `kept` does not read moves to host memory; pages that came free."""
        running = [t for t in family.threads if t.status is Status.RUNNING]
        before = self.cache.num_available
        for thread in running:
            self._lose_slot(thread)
        self._move_out(family.live, kept)
        moved = self.cache.num_available - before
        if moved or running:
            family.counters.preemptions += 1
            self._on_preempt(family, None, moved, False)
        return moved

    def _lose_slot(self, thread: Thread) -> None:
        assert thread.context is not None
        thread.slot = None
        thread.status = Status.WAITING
        self.cache.trim(thread.context)

    def _move_out(self, threads: Iterable[Thread], kept: Sequence[Thread] = ()) -> None:
        """Moves to host memory what these threads read and neither a running thread nor one of `kept` does."""
        readers = [*self.threads(Status.RUNNING), *kept]
        kept_ids = {s.id for s in _unique_segments(readers)}
        for thread in threads:
            assert thread.context is not None and thread.status is not Status.RUNNING
            self.cache.trim(thread.context)
        segments = [s for s in _unique_segments(threads) if s.id not in kept_ids and not s.swapped]
        for segment, page_ids in self.cache.swap_out(segments):
            self.cache.finish_swap_out(segment, self._read_pages(page_ids))

    def _stop(self, work: Work, thread: Thread, stop: Stop) -> None:
        assert thread.context is not None
        self.cache.trim(thread.context)
        thread.slot = None
        thread.status = Status.STOPPED
        thread.stop = stop
        work.stopped.append(thread)


def _unique_segments(threads: Iterable[Thread]) -> list[Segment]:
    found = {s.id: s for t in threads if t.context is not None for s in t.context.segments}
    return list(found.values())
