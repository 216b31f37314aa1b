"""Drills: rows of what is rare in whole traces and hard to learn.

*Rounds*, about half of them with a match, teach that a value is among four others: in whole traces one in about sixty
is. Operands are given, slots and marks are learned. *Nodes* of APR's text, of unrelated states, teach to list a node's
numbers before the operation that makes the last of them: a tenth of what a trace says.
"""

from collections.abc import Collection

import numpy as np

from apr_jax.tasks.countdown import Problem
from apr_jax.tasks.countdown_apr import END_RETURNED, node_pieces, root_pieces
from apr_jax.tasks.countdown_search import MAX_VALUE, compare, quad, search
from apr_jax.tasks.countdown_vocabulary import BOS, MATCH, MAX_TARGET, MODES, NEAREST, numbers_pieces
from apr_jax.tasks.trace import Span, Trace

NUM_ROUNDS = 11
NUM_STATES = 9


def draw_nodes(rng: np.random.Generator, exclude: Collection[Problem] = ()) -> Trace:
    """A row of states with the nodes of one or more blocks.

    Args:
      exclude: problems whose states are left out (a held-out set).
    """
    spans = [Span((BOS,), forced=1)]
    for _ in range(NUM_STATES):
        problem = Problem(tuple(int(n) for n in rng.integers(1, 100, 4)), int(rng.integers(10, MAX_TARGET + 1)))
        if problem in exclude:
            continue
        pieces, first = [*root_pieces(problem), " ;"], 0
        for lines in search(problem).blocks[: int(rng.choice([1, 1, 1, 2, 3]))]:
            spans.append(Span((*pieces, *node_pieces(lines, first), "\n"), forced=len(pieces)))
            pieces, first = [END_RETURNED, "\n"], first + len(lines)
    return tuple(spans)


def draw_rounds(rng: np.random.Generator) -> Trace:
    """A row of rounds."""
    spans = [Span((BOS, MODES["sequential"], " ,"), forced=3)]
    earlier: tuple[int, int] = (1, 1)
    for _ in range(NUM_ROUNDS):
        pair = (int(rng.integers(1, 100)), int(rng.integers(1, 100 if rng.random() < 0.7 else 13)))
        kind = rng.random()
        if kind < 0.4:
            target, number = _partner(rng, pair)
        elif kind < 0.7:  # almost a match
            target, number = _partner(rng, pair)
            target = min(MAX_VALUE, max(0, target + int(rng.choice([-3, -2, -1, 1, 2, 3]))))
        elif kind < 0.8:  # what the round before made does not count
            target, number = _partner(rng, earlier)
        else:
            target, number = int(rng.integers(0, MAX_VALUE + 1)), int(rng.integers(1, 100))
        earlier = pair
        found = compare(pair, target, number)
        spans.append(Span((*numbers_pieces(pair), " ="), forced=3))
        spans.append(Span((*numbers_pieces(found.made), " |")))
        spans.append(Span((*numbers_pieces((target, number)), " ="), forced=3))
        needed = (*numbers_pieces(found.needed), NEAREST, *numbers_pieces(found.nearest))
        if found.slot is None:
            spans.append(Span((*needed, " ,")))
        else:
            spans.append(Span((*needed, MATCH)))
            spans.append(Span((" ,",), forced=1))
    return tuple(spans)


def _partner(rng: np.random.Generator, pair: tuple[int, int]) -> tuple[int, int]:
    """A target and a number whose quad holds a value that the pair makes."""
    made = [value for value in quad(*pair) if value is not None]
    value = int(made[rng.integers(len(made))])
    while True:
        number = int(rng.integers(1, 100)) if rng.random() < 0.6 else int(rng.integers(1, 12))
        targets = [value + number, abs(value - number), value * number]
        if value and value % number == 0:
            targets.append(value // number)
        targets = [target for target in targets if target <= MAX_VALUE and value in quad(target, number)]
        if targets:
            return int(targets[rng.integers(len(targets))]), number
