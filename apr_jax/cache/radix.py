"""The radix tree of the prefix cache: nodes are sealed segments of whole pages of plain causal contexts."""

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence

from apr_jax.cache.context import Segment

PageKey = tuple[int, ...]  # the tokens of a node's first page


@dataclasses.dataclass(eq=False)
class Node:
    """A segment in the tree, or a root (no segment).

    Attributes:
      segment: None for a root.
      parent: None for a root, and for a node that has left the tree.
      children: by the tokens of their first page.
      last_used: a logical clock's value.
    """

    segment: Segment | None = None
    parent: "Node | None" = None
    children: dict[PageKey, "Node"] = dataclasses.field(default_factory=dict)
    last_used: int = 0


class RadixTree:
    """Maps token paths, by whole pages, to segments. One root for each start position.

    Args:
      page_size: tokens a page.
      on_split: called with a segment that has been split; it must put `split_into` in its place wherever it
        is held.
      on_free: called with a segment that has left the tree and that no context holds.
    """

    def __init__(
        self,
        page_size: int,
        on_split: Callable[[Segment], None],
        on_free: Callable[[Segment], None],
    ):
        self._page_size = page_size
        self._on_split = on_split
        self._on_free = on_free
        self._roots: dict[int, Node] = {}
        self._clock = 0

    def root(self, start_position: int) -> Node:
        return self._roots.setdefault(start_position, Node())

    def nodes(self) -> Iterator[Node]:
        """Every node that holds a segment, parents first."""
        for root in self._roots.values():
            yield from _descendants(root)

    def touch(self, node: Node) -> None:
        """Marks a node and its ancestors as just used."""
        self._clock += 1
        while node.segment is not None:
            node.last_used = self._clock
            assert node.parent is not None
            node = node.parent

    def walk(self, node: Node, token_ids: Sequence[int]) -> list[Node]:
        """The nodes below `node` that hold the whole pages token_ids begins with.

        Splits the last one if token_ids hold a part of it only.
        """
        size = self._page_size
        path: list[Node] = []
        at = 0
        while at + size <= len(token_ids):
            child = node.children.get(tuple(token_ids[at : at + size]))
            if child is None:
                break
            assert child.segment is not None
            pages = self._common_pages(child.segment.token_ids, token_ids, at)
            if pages < len(child.segment.pages):
                child = self._split(child, pages)
            path.append(child)
            node = child
            at += pages * size
        if path:
            self.touch(path[-1])
        return path

    def insert(self, node: Node, segment: Segment) -> Node:
        """Hangs a sealed segment of whole pages below `node`; no child of it may begin with the same page."""
        key = tuple(segment.token_ids[: self._page_size])
        assert key not in node.children, "the tree already holds these tokens"
        child = Node(segment=segment, parent=node)
        node.children[key] = child
        segment.node = child
        self.touch(child)
        return child

    def detach(self, node: Node) -> None:
        """Takes a node and all below it out of the tree; what no context holds is freed."""
        subtree = [node, *_descendants(node)]
        assert node.parent is not None and node.segment is not None
        del node.parent.children[self._key(node)]
        for each in subtree:
            assert each.segment is not None
            each.segment.node = None
            each.parent = None
            if each.segment.refs == 0:
                self._on_free(each.segment)

    def clear(self) -> None:
        for root in self._roots.values():
            for child in list(root.children.values()):
                self.detach(child)
        self._roots.clear()

    def num_evictable(self) -> int:
        """Pages of nodes which, with all below them, no context holds."""

        def count(node: Node) -> tuple[int, bool]:
            results = [count(child) for child in node.children.values()]
            free = all(is_free for _, is_free in results)
            pages = sum(pages for pages, _ in results)
            if node.segment is None:
                return pages, free
            free = free and node.segment.refs == 0
            return pages + (len(node.segment.pages) if free else 0), free

        return sum(count(root)[0] for root in self._roots.values())

    def evict(self, num_pages: int, release: Callable[[int], None]) -> None:
        """Releases up to num_pages pages, the last ones of the least recently used leaves nobody holds."""
        heap = [(node.last_used, id(node), node) for node in self.nodes() if _is_evictable(node)]
        heapq.heapify(heap)
        while num_pages > 0 and heap:
            _, _, leaf = heapq.heappop(heap)
            segment, parent = leaf.segment, leaf.parent
            assert segment is not None and parent is not None
            taken = min(num_pages, len(segment.pages))
            num_pages -= taken
            kept = len(segment.pages) - taken
            if kept:
                for page in segment.pages[kept:]:
                    release(page)
                del segment.pages[kept:], segment.token_ids[kept * self._page_size :]
                return
            self.detach(leaf)
            if _is_evictable(parent):
                heapq.heappush(heap, (parent.last_used, id(parent), parent))

    def _key(self, node: Node) -> PageKey:
        assert node.segment is not None
        return tuple(node.segment.token_ids[: self._page_size])

    def _common_pages(self, held: list[int], token_ids: Sequence[int], at: int) -> int:
        size, pages = self._page_size, 0
        while (pages + 1) * size <= len(held) and at + (pages + 1) * size <= len(token_ids):
            span = slice(pages * size, (pages + 1) * size)
            if held[span] != list(token_ids[at + span.start : at + span.stop]):
                break
            pages += 1
        return pages

    def _split(self, node: Node, pages: int) -> Node:
        """Moves a node's first pages to a new node above it and returns that."""
        whole, parent = node.segment, node.parent
        assert whole is not None and parent is not None and 0 < pages < len(whole.pages)
        parent_key = self._key(node)
        tokens = pages * self._page_size
        first = Segment(
            start_position=whole.start_position,
            previous_id=whole.previous_id,
            pages=whole.pages[:pages],
            token_ids=whole.token_ids[:tokens],
            sealed=True,
            refs=whole.refs,
        )
        second = Segment(
            start_position=whole.start_position + tokens,
            previous_id=first.id,
            pages=whole.pages[pages:],
            token_ids=whole.token_ids[tokens:],
            sealed=True,
            refs=whole.refs,
            node=node,
            id=whole.id,  # what continued the whole now continues this
        )
        node.segment = second
        upper = Node(segment=first, parent=parent, last_used=node.last_used)
        first.node = upper
        whole.split_into, whole.node, whole.pages, whole.refs = (first, second), None, [], 0
        parent.children[parent_key] = upper
        upper.children[self._key(node)] = node
        node.parent = upper
        self._on_split(whole)
        return upper


def _is_evictable(node: Node) -> bool:
    return node.segment is not None and node.parent is not None and not node.children and node.segment.refs == 0


def _descendants(node: Node) -> Iterator[Node]:
    stack = list(node.children.values())
    while stack:
        each = stack.pop()
        yield each
        stack.extend(each.children.values())
