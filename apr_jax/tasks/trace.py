"""A written-down piece of reasoning: spans of text pieces and blocks of branches that do not see each other.

A trace is what a program of the engine produces: a root whose text may hold blocks, each a fork and a join. A
piece is one token. Tasks write traces, the trainer turns them into tokens, positions and masks.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive pieces; the first `forced` are put there by the prompt or the engine, not by the model.

    `kept` is the index of the first piece that survives a `conclusion` join, if this span holds one.
    """

    pieces: tuple[str, ...]
    forced: int = 0
    kept: int | None = None

    def __post_init__(self):
        if not 0 <= self.forced <= len(self.pieces):
            raise ValueError(f"forced is {self.forced}, must be in [0, {len(self.pieces)}]")


@dataclasses.dataclass(frozen=True)
class Block:
    """Branches of one fork, each a trace of its own, and how they are joined.

    Attributes:
      join: `stitch` (or `conclusion`, where branches have a kept end): positions go on behind the longest branch.
        `prefill`: branches are read one after another. `splice`: there is one branch, the call, which nothing behind it
        sees; what it calls are `searches`, traces that share no context with it.
      chosen: the branch that a join of the first success takes, if one succeeds.
    """

    branches: tuple["Trace", ...]
    join: Literal["stitch", "prefill", "splice"] = "stitch"
    searches: tuple["Trace", ...] = ()
    chosen: int | None = None


Trace = tuple[Span | Block, ...]


def trace_spans(trace: Trace) -> Iterator[Span]:
    """All spans in reading order; a call that is spliced away, and what it called, are not read."""
    for part in trace:
        if isinstance(part, Span):
            yield part
        elif part.join != "splice":
            for branch in part.branches:
                yield from trace_spans(branch)


def trace_text(trace: Trace) -> str:
    """The text of all spans in reading order."""
    return "".join(piece for span in trace_spans(trace) for piece in span.pieces)


def num_pieces(trace: Trace) -> int:
    """Tokens of the flattened trace."""
    return sum(len(span.pieces) for span in trace_spans(trace))


def critical_path(trace: Trace) -> int:
    """Tokens on the longest chain: of each block only the longest branch counts. Prompts of searches do not."""
    length = 0
    for part in trace:
        if isinstance(part, Span):
            length += len(part.pieces)
        else:
            length += max(map(critical_path, part.branches))
            length += max((critical_path(each) - _prompt_len(each) for each in part.searches), default=0)
    return length


def _prompt_len(search: Trace) -> int:
    return search[0].forced if isinstance(search[0], Span) else 0
