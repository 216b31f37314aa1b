"""Held-out figures that need no decoding: what a model would do if it stayed on the reference trace.

If the most likely token is the reference's at every sampled token of a trace, greedy decoding writes exactly
this trace. So `solved` is a lower bound of what greedy decoding solves.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from apr_jax.models.decoder import Decoder
from apr_jax.tasks.countdown import Problem
from apr_jax.tasks.countdown_renderings import RENDERINGS
from apr_jax.tasks.countdown_search import search
from apr_jax.tasks.countdown_vocabulary import MATCH, vocabulary
from apr_jax.train.countdown_data import PAD_ID, PIECE_IDS
from apr_jax.train.packing import Row, flatten, pack, stack
from apr_jax.train.supervised import make_eval_step

LENGTHS = (128, 512, 1024, 2048)
SLOTS = ("difference", "sum", "product", "quotient")


def teacher_forced(problems: Sequence[Problem]) -> Callable[[Decoder], dict[str, float]]:
    """An evaluation of Countdown traces.

    Returns:
      decoder -> per rendering: loss, accuracy (of tokens), exact (share of traces), solved (exact, and the
      trace ends in an answer); and the error of each slot of a quad, of seeing a match and of the rest.
    """
    traces: list[tuple[str, bool]] = []  # (program, whether the trace ends in an answer)
    rows: list[tuple[int, Row]] = []  # of trace number
    for problem in problems:
        tree = search(problem)
        for program, render in RENDERINGS.items():
            parts = flatten(render(tree), PIECE_IDS.__getitem__)
            if max(map(len, parts)) <= LENGTHS[-1]:
                rows += [(len(traces), row) for row in parts]
                traces.append((program, tree.solution is not None))
    steps: dict[int, Callable] = {}

    def evaluate(decoder: Decoder) -> dict[str, float]:
        graphdef, params = nnx.split(decoder)
        step = steps.setdefault(0, make_eval_step(graphdef))
        totals: dict[str, list[float]] = {}
        exact = [True] * len(traces)

        def add(name: str, value: float, weight: float = 1.0) -> None:
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += weight

        for length, shorter in zip(LENGTHS, (0, *LENGTHS), strict=False):
            group = [entry for entry in rows if shorter < len(entry[1]) <= length]
            size = max(1, 4096 // length)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                padded = [pack([row], [length], PAD_ID)[length][0] for _, row in part]
                padded += [padded[0]] * (size - len(padded))
                losses, hits = jax.device_get(step(params, stack(padded)))
                for i, (trace, row) in enumerate(part):
                    program, _ = traces[trace]
                    sampled, count = row.loss > 0, len(row)
                    right = hits[i, :count][sampled]
                    exact[trace] &= bool(right.all())
                    add(f"{program}/loss", float(losses[i].sum()), float(sampled.sum()))
                    add(f"{program}/accuracy", float(right.sum()), float(sampled.sum()))
                    for kind, wrong in _errors(row, hits[i, :count]):
                        add(f"error/{kind}", wrong)
        for (program, solvable), right in zip(traces, exact, strict=True):
            add(f"{program}/exact", float(right))
            add(f"{program}/solved", float(right and solvable))
        return {name: round(total / weight, 5) for name, (total, weight) in totals.items()}

    return evaluate


def _errors(row: Row, hits: np.ndarray):
    """(kind of token, 1.0 if it was predicted wrongly) for every sampled token."""
    pieces = vocabulary()
    equals, match = pieces.index(" ="), pieces.index(MATCH)
    for at in np.flatnonzero(row.loss > 0):
        since = next((i for i in range(4) if at >= i and row.tokens[at - i] == equals), None)
        kind = "rest" if since is None else SLOTS[since]
        if row.tokens[at + 1] == match:
            kind = "match"
        yield kind, 1.0 - float(hits[at])
