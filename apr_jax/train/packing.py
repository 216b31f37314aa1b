"""Traces to arrays: what is trained is what the engine decodes.

Positions follow Multiverse: every branch of a block starts at the fork's next position, and what comes after
the block goes on from the largest next position of the branches. Siblings do not see each other; what comes
after a block sees all of it (`stitch`), or of each branch only the kept end (`conclusion`).

The mask of a row is held as three numbers a token, so that it is built on the device and several traces can
share a row: token k is visible to q exactly if k <= q < end[k] and not hide_from[k] <= q < hide_to[k].

Letters: B rows, T tokens a row.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.tasks.trace import Span, Trace

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


def flatten(trace: Trace, piece_id: Callable[[str], int], join: str = "stitch") -> Row:
    """One trace as a row of exactly its length.

    Args:
      piece_id: maps a piece to its token id.
      join: "stitch" or "conclusion".

    Raises:
      ValueError: an unknown join, or a block inside a branch.
    """
    if join not in ("stitch", "conclusion"):
        raise ValueError(f"join is {join!r}, must be 'stitch' or 'conclusion'")
    tokens: list[int] = []
    positions: list[int] = []
    sampled: list[bool] = []
    hide_from: list[int] = []
    hide_to: list[int] = []

    def add(span: Span, position: int) -> int:
        tokens.extend(piece_id(piece) for piece in span.pieces)
        positions.extend(range(position, position + len(span.pieces)))
        sampled.extend(i >= span.forced for i in range(len(span.pieces)))
        hide_from.extend([0] * len(span.pieces))
        hide_to.extend([0] * len(span.pieces))
        return position + len(span.pieces)

    position = 0
    dropped: list[tuple[int, int]] = []
    for part in trace:
        if isinstance(part, Span):
            position = add(part, position)
            continue
        bounds, farthest = [], position
        for branch in part.branches:
            start, branch_position, kept = len(tokens), position, None
            for span in branch:
                if not isinstance(span, Span):
                    raise ValueError("a block inside a branch is not supported in training")
                if span.kept is not None:
                    kept = len(tokens) + span.kept
                branch_position = add(span, branch_position)
            bounds.append((start, len(tokens)))
            if kept is not None:
                dropped.append((start, kept))
            farthest = max(farthest, branch_position)
        for start, stop in bounds:
            hide_from[start:stop] = [stop] * (stop - start)
            hide_to[start:stop] = [len(tokens)] * (stop - start)
        position = farthest
    if join == "conclusion":
        for start, stop in dropped:
            hide_to[start:stop] = [len(tokens)] * (stop - start)
    loss = np.zeros(len(tokens), np.float32)
    loss[:-1] = sampled[1:]
    end = [len(tokens)] * len(tokens)
    ids, places, ends, hidden_from, hidden_to = (
        np.asarray(a, np.int32) for a in (tokens, positions, end, hide_from, hide_to)
    )
    return Row(ids, places, ends, hidden_from, hidden_to, loss)


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
