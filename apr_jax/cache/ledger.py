"""Who holds which pages: contexts, the prefix tree, host memory.

A segment holds its pages; contexts and the tree hold segments. Every page is free, referenced (its segment is held
by a context) or cached (held by the tree alone): `check` recounts all three.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from apr_jax.cache.context import Context, Segment
from apr_jax.cache.pool import PagePool
from apr_jax.cache.radix import RadixTree
from apr_jax.config import CacheConfig
from apr_jax.types import OutOfPages


class Ledger:
    """The accounts of one page pool. What contexts do with their pages is `KVCache`'s."""

    def __init__(self, config: CacheConfig):
        self.config = config
        self.page_size = config.page_size
        self.pool = PagePool(config.num_pages)
        self._contexts: dict[int, Context] = {}
        self._tree = RadixTree(config.page_size, self._replace_split, self._free_pages)

    # Counts.

    @property
    def num_cached_pages(self) -> int:
        """Pages held by the prefix cache alone."""
        return sum(len(node.segment.pages) for node in self._tree.nodes() if node.segment and not node.segment.refs)

    @property
    def num_available(self) -> int:
        """Pages that can be had now: free, or cached and evictable."""
        return self.pool.num_free + self._tree.num_evictable()

    @property
    def num_unused_slots(self) -> int:
        """Slots of pages in use, past their segment's last token: the price of pages longer than one token."""
        held = {s.id: s for context in self._contexts.values() for s in context.segments if not s.swapped}
        return sum(self._num_used_pages(s) * self.page_size - len(s.token_ids) for s in held.values())

    def check(self) -> None:
        """Recounts everything from the live contexts and the tree. AssertionError at the first difference."""
        self.pool.check()
        refs: dict[int, int] = {}
        for context in self._contexts.values():
            assert all(segment.sealed for segment in context.segments[:-1]), "an open segment is not the last"
            for segment in context.segments:
                refs[segment.id] = refs.get(segment.id, 0) + 1
        segments = {segment.id: segment for segment in self._live_segments()}
        owner: dict[int, int] = {}
        for segment in segments.values():
            assert segment.refs == refs.get(segment.id, 0), f"{segment} has {segment.refs} references"
            assert not (segment.swapped and segment.pages), f"{segment} is swapped and has pages"
            used = self._num_used_pages(segment)
            if not segment.swapped:
                assert len(segment.pages) == used or (not segment.sealed and len(segment.pages) > used), segment
            for page in segment.pages:
                assert page not in owner, f"page {page} is in segments {owner[page]} and {segment.id}"
                assert self.pool.is_in_use(page), f"page {page} of segment {segment.id} is free"
                owner[page] = segment.id
        for node in self._tree.nodes():
            assert node.segment is not None and node.segment.node is node and node.segment.sealed
            assert len(node.segment.token_ids) == len(node.segment.pages) * self.page_size > 0, node.segment
        referenced = sum(len(segment.pages) for segment in segments.values() if segment.refs)
        assert self.pool.num_free + referenced + self.num_cached_pages == self.pool.total, "a page is lost"

    def num_pages_of(self, segments: Iterable[Segment]) -> int:
        """Pages that the segments' tokens fill, wherever they are."""
        return sum(self._num_used_pages(segment) for segment in segments)

    # Host memory.

    def swap_out(self, segments: Sequence[Segment]) -> list[tuple[Segment, list[int]]]:
        """Takes segments out of the prefix cache and names the pages to copy to host memory.

        Every context that reads them must be preempted. Nothing else changes until `finish_swap_out`.

        Returns:
          (segment, page ids) for each distinct segment on the device that has tokens.
        """
        copies = []
        for segment in dict.fromkeys(segments):
            if segment.node is not None:
                self._tree.detach(segment.node)
            if segment.token_ids and not segment.swapped:
                copies.append((segment, segment.pages[: self._num_used_pages(segment)]))
        return copies

    def finish_swap_out(self, segment: Segment, data: Any) -> None:
        """Keeps data, what was copied out, and frees the segment's pages."""
        assert not segment.swapped and segment.node is None, segment
        self._free_pages(segment)
        segment.swapped, segment.host_data = True, data

    def swap_in(self, segments: Sequence[Segment]) -> list[tuple[Segment, list[int]]]:
        """Gives swapped segments pages again; the engine writes `host_data` to them, then calls
        `finish_swap_in`.

        Returns:
          (segment, page ids) for each distinct swapped segment.

        Raises:
          OutOfPages: not all fit, even after eviction; nothing has changed.
        """
        swapped = [segment for segment in dict.fromkeys(segments) if segment.swapped]
        pages = self._allocate(sum(self._num_used_pages(segment) for segment in swapped))
        for segment in swapped:
            segment.pages = [pages.pop() for _ in range(self._num_used_pages(segment))]
            segment.swapped = False
        return [(segment, segment.pages[:]) for segment in swapped]

    def finish_swap_in(self, segment: Segment) -> None:
        """Drops the host's copy."""
        segment.host_data = None

    # For what contexts do.

    def _live_segments(self):
        for context in self._contexts.values():
            yield from context.segments
        for node in self._tree.nodes():
            assert node.segment is not None
            yield node.segment

    def _num_used_pages(self, segment: Segment) -> int:
        return -(-len(segment.token_ids) // self.page_size)

    def _allocate(self, n: int) -> list[int]:
        missing = n - self.pool.num_free
        if missing > 0:
            if n > self.num_available:
                raise OutOfPages(n, self.num_available)
            self._tree.evict(missing, self.pool.release)
        return self.pool.allocate(n)

    def _hold(self, context: Context, segment: Segment) -> None:
        segment.refs += 1
        context.segments.append(segment)

    def _drop(self, segment: Segment) -> None:
        assert segment.refs > 0, f"{segment}: its count would fall below zero"
        segment.refs -= 1
        if segment.refs == 0:
            if segment.node is None:
                self._free_pages(segment)
                segment.host_data = None
            else:
                self._tree.touch(segment.node)

    def _free_pages(self, segment: Segment) -> None:
        for page in segment.pages:
            self.pool.release(page)
        segment.pages = []

    def _replace_split(self, segment: Segment) -> None:
        for context in self._contexts.values():
            if segment not in context.segments:
                continue
            before = context.segments
            context.segments = resolve(before)
            context.fork_index += before[: context.fork_index].count(segment)
            if context.mark_index is not None:
                context.mark_index += before[: context.mark_index].count(segment)


def resolve(segments: Iterable[Segment]) -> list[Segment]:
    """Replaces segments that were split by what they were split into."""
    resolved = []
    for segment in segments:
        resolved += [segment] if segment.split_into is None else resolve(segment.split_into)
    return resolved
