"""Segments and contexts: what a thread attends to."""

import dataclasses
import itertools
from typing import Any

import numpy as np

_segment_ids = itertools.count(1)


@dataclasses.dataclass(eq=False)
class Segment:
    """An append-only list of pages holding consecutive tokens. Only its last page may be partly filled.

    A sealed segment never changes; splitting a radix node replaces it by two. It holds one reference to each
    of its pages. A context may hold a segment several times: children that wrote the same tokens share one,
    and a join gives the parent both.

    Attributes:
      start_position: the position of the first token; the others follow.
      previous_id: the segment it continued when it began, None at a context's start. A context is plain
        causal where each segment follows its previous one.
      pages: page ids; empty while swapped. Those of an open tail may reach beyond its tokens (reserved).
      token_ids: tokens that have keys.
      sealed: no more tokens come.
      refs: how often contexts hold it.
      node: the radix tree's node that holds it, or None.
      swapped: its pages are in host memory, in `host_data`.
      host_data: what the engine copied out, opaque here.
      split_into: the two segments that replaced it; it holds nothing any more.
      id: unique and increasing.
    """

    start_position: int
    previous_id: int | None
    pages: list[int] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    sealed: bool = False
    refs: int = 0
    node: Any = None
    swapped: bool = False
    host_data: Any = None
    split_into: "tuple[Segment, Segment] | None" = None
    id: int = dataclasses.field(default_factory=lambda: next(_segment_ids))
    _array: tuple[list[int], np.ndarray] | None = None  # the list of pages it was made from, and `page_array`

    def page_array(self) -> np.ndarray:
        """A sealed segment's page ids, i32 and read-only. The same array as long as its pages are the same."""
        assert self.sealed, self
        if self._array is None or self._array[0] is not self.pages or len(self._array[1]) != len(self.pages):
            array = np.array(self.pages, np.int32)
            array.flags.writeable = False
            self._array = self.pages, array
        return self._array[1]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def end_position(self) -> int:
        return self.start_position + len(self.token_ids)

    def __repr__(self) -> str:
        kind = "sealed" if self.sealed else "open"
        where = f"start={self.start_position}, tokens={len(self.token_ids)}, pages={self.pages}"
        return f"Segment(id={self.id}, {kind}, {where})"


@dataclasses.dataclass(eq=False)
class Context:
    """An ordered list of segments, of which only the last, the tail, can still grow.

    Only `KVCache` changes it.

    Attributes:
      next_position: the position of the next token to be written.
      start_position: the position the context began at.
      segments: those read, the open tail (if any) last.
      causal: a plain causal sequence, which the prefix cache may hold by its tokens.
      fork_index: how many of the segments came from the parent at the fork; kept right when the tree splits
        one.
      mark_index: how many segments there were at the last `mark`, or None.
      weights_version: the version of the weights its keys were computed with.
    """

    next_position: int = 0
    start_position: int = 0
    segments: list[Segment] = dataclasses.field(default_factory=list)
    causal: bool = True
    fork_index: int = 0
    mark_index: int | None = None
    weights_version: int = 0

    @property
    def tail(self) -> Segment | None:
        """The open segment, or None when nothing is reserved since the last seal."""
        if self.segments and not self.segments[-1].sealed:
            return self.segments[-1]
        return None

    @property
    def tail_len(self) -> int:
        """Tokens with keys in the tail."""
        return len(self.segments[-1].token_ids) if self.tail is not None else 0

    @property
    def num_tokens(self) -> int:
        """Tokens a new query would see."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def num_pages(self) -> int:
        """Pages held on the device, reserved ones among them."""
        return sum(len(segment.pages) for segment in self.segments)


def own_segments(child: Context, parent_num_segments: int | None = None) -> list[Segment]:
    """A child's segments beyond those it got from its parent, empty ones left out.

    Args:
      child: a context made by a fork.
      parent_num_segments: how many came from the parent; None, the safe choice, takes what the child
        remembers (a split in the radix tree changes the number).
    """
    first = child.fork_index if parent_num_segments is None else parent_num_segments
    return [segment for segment in child.segments[first:] if segment.token_ids]


def marked_segments(child: Context) -> list[Segment]:
    """A child's segments since its last mark; all of its own if it has none."""
    first = child.fork_index if child.mark_index is None else child.mark_index
    return own_segments(child, first)
