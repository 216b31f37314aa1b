"""Who gives up pages so that another thread can go on. Segments move to host memory and back, whole.

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

from collections.abc import Callable, Iterable, Sequence

from apr_jax.cache.cache import KVCache
from apr_jax.cache.context import Context, Segment
from apr_jax.config import EngineConfig
from apr_jax.engine.thread import WANTS_TO_RUN, Family, Status, Thread
from apr_jax.types import OutOfPages


class Preemption:
    """Moves families to host memory and back. Who runs is the scheduler's to decide.

    Args:
      read_pages: page ids -> host data; write_pages: (page ids, data) -> None. The device's side.
      on_preempt: told (family, thread or None for all of it, pages moved, resumed).
    """

    def __init__(
        self,
        config: EngineConfig,
        cache: KVCache,
        read_pages: Callable,
        write_pages: Callable,
        on_preempt: Callable[[Family, Thread | None, int, bool], None],
    ):
        self.config = config
        self.cache = cache
        self.families: dict[int, Family] = {}
        self._read_pages = read_pages
        self._write_pages = write_pages
        self._on_preempt = on_preempt

    def max_family_pages(self, family: Family) -> int:
        """Pages that the family may hold: the least of the pool, the engine's bound and its own."""
        bounds = (self.cache.pool.total, self.config.max_family_pages, family.max_pages)
        return min(bound for bound in bounds if bound is not None)

    def threads(self, *statuses: Status) -> list[Thread]:
        """Threads in these states, oldest family first, then oldest thread."""
        return [t for f in self.families.values() for t in f.threads if t.status in statuses]

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

    def pages_with_prompts(self, family: Family, prompts: Sequence[Sequence[int]], contexts: Sequence[Context]) -> int:
        """Pages that the family holds at least once it has computed prompts beside what it holds now.

        Args:
          prompts: pages that they begin with alike are counted once, where prefixes are cached.
          contexts: what `match_prefix` gave for each.
        """
        size = self.cache.page_size
        held = {s.id for s in _unique_segments(family.live)}
        matched = {s.id: s for context in contexts for s in context.segments if s.id not in held}
        whole: set[int] = set()
        num_partial = 0
        for ordinal, (ids, context) in enumerate(zip(prompts, contexts, strict=True)):
            path = 0 if self.cache.config.prefix_cache else ordinal
            for end in range(size, len(ids) + 1, size):
                path = hash((path, tuple(ids[end - size : end])))
                if end > context.num_tokens:
                    whole.add(path)
            num_partial += len(ids) % size > 0
        return self.family_pages(family) + self.cache.num_pages_of(matched.values()) + len(whole) + num_partial

    def pages_read(self, thread: Thread) -> int:
        """Pages that a token of the thread reads: those of a segment that it holds several times count each time."""
        assert thread.context is not None
        return self.cache.num_pages_of(thread.context.segments)

    # For the scheduler.

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

    def _pages_given_up(self, family: Family, kept: Sequence[Thread]) -> int:
        """Pages that would come free if the family stepped back."""
        readers = [t for t in self.threads(Status.RUNNING) if t.family is not family]
        kept_ids = {s.id for s in _unique_segments([*readers, *kept])}
        return sum(len(s.pages) for s in _unique_segments(family.live) if s.id not in kept_ids)

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


def _unique_segments(threads: Iterable[Thread]) -> list[Segment]:
    found = {s.id: s for t in threads if t.context is not None for s in t.context.segments}
    return list(found.values())
