"""When the children of one fork say their tokens, on a clock that lets every thread which may go on say one a tick.

Where a family's `max_width` lets only so many of them run side by side, the next one, in the order of the fork, begins
when one of these ends: a list schedule (Graham 1966, Bell System Technical Journal 45). It follows from lengths alone,
the same whatever else the engine runs and whoever was seen to end first.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """Ticks since the fork, half-open: no child can begin or end before these.

    Attributes:
      is_known: whether start and end are final. Else they may still move back, as a child grows.
      row: of those that the children run in, one behind the other.
    """

    start: int
    end: int
    is_known: bool
    row: int


def spans(children: Iterable[tuple[int, bool]], max_width: int | None) -> list[Span]:
    """Spans of (tokens said up to now, whether there may be more) in the order of the fork.

    Longer children move no other one forward, so what follows from lengths up to now are bounds.
    """
    children = list(children)
    if max_width is None or max_width >= len(children):  # nobody waits
        return [Span(0, length, not may_grow, row) for row, (length, may_grow) in enumerate(children)]
    last = [Span(0, 0, True, row) for row in range(max_width)]  # in each row
    found, is_known = [], True  # whether all starts so far are final
    for length, may_grow in children:
        # Of rows that come free at the same time, one that surely does: the others can but come later.
        before = min(last, key=lambda span: (span.end, not span.is_known, span.row))
        is_known = is_known and before.is_known
        last[before.row] = Span(before.end, before.end + length, is_known and not may_grow, before.row)
        found.append(last[before.row])
    return found


def makespan(lengths: Iterable[int], max_width: int | None) -> int:
    """Ticks until the last of the children has ended."""
    return max((span.end for span in spans(((length, False) for length in lengths), max_width)), default=0)
