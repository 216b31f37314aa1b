"""Who reads which pages: from what the engine tells of contexts."""

import dataclasses
from collections.abc import Callable, Sequence

from apr_jax.engine.events import SegmentState
from apr_jax.tracing.trace import SegmentUse

MAX_PAST = 50_000  # segments without readers whose writers are remembered


@dataclasses.dataclass
class _Segment:
    writer: int
    start_position: int
    num_pages: int = 0
    on_device: bool = True
    readers: dict[int, bool] = dataclasses.field(default_factory=dict)  # thread -> whether it came by a join
    max_readers: int = 0


class Sharing:
    """Segments with their readers, now.

    Args:
      is_ancestor: is_ancestor(a, b): whether thread a is above thread b.
    """

    def __init__(self, is_ancestor: Callable[[int, int], bool]):
        self._is_ancestor = is_ancestor
        self._segments: dict[int, _Segment] = {}  # that some thread reads
        self._past: dict[int, _Segment] = {}  # that none does: the prefix cache may bring them back
        self._held: dict[int, tuple[SegmentState, ...]] = {}

    def hold(self, thread: int, segments: Sequence[SegmentState]) -> None:
        """The thread's context consists of these now."""
        held = {s.id for s in segments}
        for state in self._held.get(thread, ()):
            if state.id not in held:
                self._forget(thread, state.id)
        for place, state in enumerate(segments):
            known = self._segments.get(state.id)
            if known is None:
                known = self._past.pop(state.id, None)
                known = known or _Segment(self._writer(thread, segments[place:]), state.start_position)
                self._segments[state.id] = known
            known.start_position = state.start_position
            known.num_pages, known.on_device = state.num_pages, bool(state.page_ids)
            known.readers[thread] = self._is_ancestor(thread, known.writer)
            known.max_readers = max(known.max_readers, len(known.readers))
        self._held[thread] = tuple(segments)

    def release(self, thread: int) -> list[SegmentUse]:
        """The thread holds nothing any more; returns what it held last."""
        uses = self.uses(thread)
        for state in self._held.pop(thread, ()):
            self._forget(thread, state.id)
        return uses

    def uses(self, thread: int) -> list[SegmentUse]:
        return [self._use(thread, state) for state in self._held.get(thread, ()) if state.num_tokens]

    def num_pages(self) -> tuple[int, int, int]:
        """Pages on the device that one thread reads, that several do, and that one does which got them by a join."""
        private = shared = joined = 0
        for segment in self._segments.values():
            if not segment.on_device:
                continue
            if len(segment.readers) > 1:
                shared += segment.num_pages
            elif any(segment.readers.values()):
                joined += segment.num_pages
            else:
                private += segment.num_pages
        return private, shared, joined

    def _writer(self, thread: int, segments: Sequence[SegmentState]) -> int:
        """Of a segment never seen before, the first of these: the thread's own, unless it is the front of one that is
        known, which the prefix cache has split or taken whole pages from.
        """
        for rest in segments[1:]:
            known = self._segments.get(rest.id)
            if known is not None:
                return known.writer if known.start_position < rest.start_position else thread
        return thread

    def _forget(self, thread: int, segment_id: int) -> None:
        segment = self._segments.get(segment_id)
        if segment is None:
            return
        segment.readers.pop(thread, None)
        if not segment.readers:
            self._past[segment_id] = self._segments.pop(segment_id)
            if len(self._past) > MAX_PAST:
                del self._past[next(iter(self._past))]

    def _use(self, thread: int, state: SegmentState) -> SegmentUse:
        segment = self._segments[state.id]
        if segment.writer == thread:
            origin = "own"
        elif self._is_ancestor(segment.writer, thread):
            origin = "forked"
        else:
            origin = "joined" if self._is_ancestor(thread, segment.writer) else "cached"
        return SegmentUse(
            id=state.id,
            num_tokens=state.num_tokens,
            num_pages=state.num_pages,
            start_position=state.start_position,
            writer=segment.writer,
            origin=origin,
            max_readers=segment.max_readers,
        )
