"""A written-down piece of reasoning: spans of text pieces and blocks of branches that do not see each other.

A trace is what a program of the engine produces: a root whose text may hold blocks, each a fork and a join. A
piece is one token. Tasks write traces, the trainer turns them into tokens, positions and masks.
"""

import dataclasses
from collections.abc import Iterator


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
    """Branches of one fork, each a trace of its own."""

    branches: tuple["Trace", ...]


Trace = tuple[Span | Block, ...]


def trace_spans(trace: Trace) -> Iterator[Span]:
    """All spans in reading order."""
    for part in trace:
        if isinstance(part, Span):
            yield part
        else:
            for branch in part.branches:
                yield from trace_spans(branch)


def trace_text(trace: Trace) -> str:
    """The text of all spans in reading order."""
    return "".join(piece for span in trace_spans(trace) for piece in span.pieces)


def num_pieces(trace: Trace) -> int:
    """Tokens of the flattened trace."""
    return sum(len(span.pieces) for span in trace_spans(trace))


def critical_path(trace: Trace) -> int:
    """Tokens on the longest chain: of each block only the longest branch counts."""
    return sum(
        len(part.pieces) if isinstance(part, Span) else max(critical_path(branch) for branch in part.branches)
        for part in trace
    )
