"""Traces to arrays: what is trained is what the engine decodes.

Every branch of a block starts at the fork's next position, and siblings do not see each other. What comes after a
block goes on from the largest next position of the branches and sees all of it (`stitch`), or of each branch only the
kept end (`conclusion`); or it sees the branches written once more, one after another (`prefill`); or it takes the place
of the one branch, a call, which it does not see (`splice`): what was called are rows of their own.

The mask of a row is held as three numbers a token, so that it is built on the device and several traces can
share a row: token k is visible to q exactly if k <= q < end[k] and not hide_from[k] <= q < hide_to[k].

Letters: B rows, T tokens a row.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.tasks.trace import Block, Span, Trace

JOINS = ("stitch", "conclusion", "first")
FIELDS = ("tokens", "positions", "end", "hide_from", "hide_to", "loss")


@dataclasses.dataclass(frozen=True)
class Row:
    """Arrays of one row, each [T].

    tokens, positions: i32. end, hide_from, hide_to: i32, the mask as described above.
    loss: f32, 1 where the NEXT token was sampled by the model, 0 where it was forced or there is none.
    """

    tokens: np.ndarray
    positions: np.ndarray
    end: np.ndarray
    hide_from: np.ndarray
    hide_to: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def flatten(trace: Trace, piece_id: Callable[[str], int], join: str = "stitch") -> list[Row]:
    """One trace as rows of exactly their lengths: the root's, then those of searches that share no context with it.

    Args:
      piece_id: maps a piece to its token id.
      join: for blocks that are stitched: "stitch", "conclusion", or "first": where a branch is chosen, what follows
        sees no other.

    Raises:
      ValueError: an unknown join, or a block inside a branch.
    """
    if join not in JOINS:
        raise ValueError(f"join is {join!r}, must be one of {', '.join(JOINS)}")
    writer = _Writer(piece_id)
    position, searches = 0, []
    for part in trace:
        if isinstance(part, Span):
            position = writer.add(part, position)
        elif part.join == "stitch":
            position = _stitch(writer, part, position, join)
        elif part.join == "prefill":
            position = _prefill(writer, part, position)
        else:
            (call,) = part.branches
            writer.end_here(*writer.branch(call, position)[:2])
            searches += [row for search in part.searches for row in flatten(search, piece_id)]
    return [writer.row(), *searches]


class _Writer:
    """A row in the making."""

    def __init__(self, piece_id: Callable[[str], int]):
        self._piece_id = piece_id
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._sampled: list[bool] = []
        self._ends: list[tuple[int, int, int]] = []  # tokens [start, stop) are not seen from `end` on
        self._hidden: list[tuple[int, int, int, int]] = []  # tokens [start, stop) by queries [hide_from, hide_to)

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, span: Span, position: int, learn: bool = True) -> int:
        """Writes a span from a position on; returns the next."""
        count = len(span.pieces)
        self._tokens += [self._piece_id(piece) for piece in span.pieces]
        self._positions += range(position, position + count)
        self._sampled += [learn and i >= span.forced for i in range(count)]
        return position + count

    def branch(self, branch: Trace, position: int, learn: bool = True) -> tuple[int, int, int | None, int]:
        """Writes a branch; returns its half-open interval, the first kept token, if marked, and the next position."""
        start, kept = len(self), None
        for span in branch:
            if not isinstance(span, Span):
                raise ValueError("a block inside a branch is not supported in training")
            if span.kept is not None:
                kept = len(self) + span.kept
            position = self.add(span, position, learn)
        return start, len(self), kept, position

    def end_here(self, start: int, stop: int) -> None:
        """Nothing that is written from now on sees these tokens."""
        self._ends.append((start, stop, len(self)))

    def hide(self, start: int, stop: int, hide_from: int, hide_to: int) -> None:
        """These tokens are not seen by those in [hide_from, hide_to)."""
        self._hidden.append((start, stop, hide_from, hide_to))

    def row(self) -> Row:
        end, hide_from, hide_to = np.full(len(self), len(self), np.int32), *np.zeros((2, len(self)), np.int32)
        for start, stop, at in self._ends:
            end[start:stop] = at
        for start, stop, first, last in self._hidden:
            hide_from[start:stop], hide_to[start:stop] = first, last
        loss = np.zeros(len(self), np.float32)
        loss[:-1] = self._sampled[1:]
        tokens, positions = np.asarray(self._tokens, np.int32), np.asarray(self._positions, np.int32)
        return Row(tokens, positions, end, hide_from, hide_to, loss)


def _stitch(writer: _Writer, block: Block, position: int, join: str) -> int:
    written = [writer.branch(branch, position) for branch in block.branches]
    for start, stop, kept, _ in written:
        writer.hide(start, stop, stop, len(writer))
        if join == "conclusion" and kept is not None:
            writer.end_here(start, kept)
    if join == "first" and block.chosen is not None:
        for i, (start, stop, *_) in enumerate(written):
            if i != block.chosen:
                writer.end_here(start, stop)
        written = [written[block.chosen]]
    return max([position, *(after for *_, after in written)])


def _prefill(writer: _Writer, block: Block, position: int) -> int:
    """Branches as they are sampled; then all but the first once more, as they are read, one after another."""
    first, *others = block.branches
    start, stop, _, after = writer.branch(first, position)
    for branch in others:
        begin, end, *_ = writer.branch(branch, position)
        writer.end_here(begin, end)
    writer.hide(start, stop, stop, len(writer))
    for branch in others:
        *_, after = writer.branch(branch, after, learn=False)
    return after


def pack(rows: Iterable[Row], lengths: Sequence[int], pad_id: int) -> dict[int, list[Row]]:
    """Puts rows side by side into rows of fixed lengths.

    A row belongs to the shortest length that holds it; those of at most half the shortest length fill the
    gaps that the others leave. First fit in the given order, so the outcome depends on nothing else.

    Args:
      lengths: ascending.

    Returns:
      Rows of each length, keyed by length.

    Raises:
      ValueError: a row longer than the largest length.
    """
    rows, fillers = list(rows), []
    bins: dict[int, list[tuple[list[Row], int]]] = {length: [] for length in lengths}
    for row in rows:
        if len(row) <= lengths[0] // 2:
            fillers.append(row)
            continue
        home = next((length for length in lengths if len(row) <= length), None)
        if home is None:
            raise ValueError(f"a trace of {len(row)} tokens does not fit rows of at most {lengths[-1]}")
        _first_fit(row, [home], bins)
    for row in fillers:
        _first_fit(row, [*reversed(lengths)], bins)
    return {length: [_concatenate(parts, length, pad_id) for parts, _ in packed] for length, packed in bins.items()}


def _first_fit(row: Row, homes: Sequence[int], bins: dict[int, list[tuple[list[Row], int]]]) -> None:
    for length in homes:
        for i, (parts, used) in enumerate(bins[length]):
            if used + len(row) <= length:
                bins[length][i] = ([*parts, row], used + len(row))
                return
    bins[homes[-1]].append(([row], len(row)))


def batches(
    packed: dict[int, list[Row]], rows_per_step: dict[int, int], pad_id: int
) -> list[dict[int, dict[str, np.ndarray]]]:
    """Groups packed rows into steps of `rows_per_step[length]` rows each; missing rows are padding.

    Returns:
      One dictionary a step, from length to the arrays of `stack`.
    """
    num_steps = max(-(-len(packed[length]) // count) for length, count in rows_per_step.items())
    steps = []
    for i in range(num_steps):
        step = {}
        for length, count in rows_per_step.items():
            rows = packed[length][i::num_steps][:count]
            empty = [_concatenate([], length, pad_id)] * (count - len(rows))
            step[length] = stack([*rows, *empty])
        steps.append(step)
    return steps


def _concatenate(parts: Sequence[Row], length: int, pad_id: int) -> Row:
    own = np.arange(length, dtype=np.int32)
    # padding sees itself alone and is seen by nobody else
    zeros = (np.zeros(length, dtype) for dtype in (np.int32, np.int32, np.int32, np.float32))
    packed = Row(np.full(length, pad_id, np.int32), next(zeros), own + 1, *zeros)
    offset = 0
    for row in parts:
        where = slice(offset, offset + len(row))
        packed.tokens[where], packed.positions[where] = row.tokens, row.positions
        packed.loss[where] = row.loss
        packed.end[where] = row.end + offset
        packed.hide_from[where], packed.hide_to[where] = row.hide_from + offset, row.hide_to + offset
        offset += len(row)
    return packed


def stack(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Rows of one length as arrays [B, T], keyed by field."""
    return {name: np.stack([getattr(row, name) for row in rows]) for name in FIELDS}


def visible(end: jax.Array, hide_from: jax.Array, hide_to: jax.Array) -> jax.Array:
    """The mask bool[T, T] of a row (query, key) from its arrays [T]."""
    query = jnp.arange(end.shape[0])[:, None]
    key = jnp.arange(end.shape[0])[None]
    return (key <= query) & (query < end) & ~((hide_from <= query) & (query < hide_to))
