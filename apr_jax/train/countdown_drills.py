"""Drills: rows of what is rare in whole traces and hard to learn.

*Rounds*, about half of them with a match, teach that a value is among four others: in whole traces one in about sixty
is. Operands are given, slots and marks are learned. *Nodes* of APR's text, of unrelated states, teach to list a node's
numbers before the operation that makes the last of them: a tenth of what a trace says. *Answers* are what follows a
match in every format, where several branches matched too: one of forty tokens of a trace, and where most answers that
are wrong go wrong.
"""

import dataclasses
from collections.abc import Collection

import numpy as np

from apr_jax.tasks.countdown import APR, Problem
from apr_jax.tasks.countdown_apr import END_RETURNED, node_pieces, returned_pieces, root_pieces, search_span
from apr_jax.tasks.countdown_format import FORMATS, Tags, answer_pieces, branch_span, line_pieces, prompt_pieces
from apr_jax.tasks.countdown_renderings import RENDERINGS
from apr_jax.tasks.countdown_search import MAX_VALUE, Line, compare, quad, search, steps_from
from apr_jax.tasks.countdown_vocabulary import BOS, LABELS, MATCH, MAX_TARGET, MODES, NEAREST, numbers_pieces
from apr_jax.tasks.trace import Block, Span, Trace

NUM_ROUNDS = 11
NUM_STATES = 9
NUM_ANSWERS = 4


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


def draw_answers(rng: np.random.Generator, exclude: Collection[Problem] = ()) -> list[Trace]:
    """At least NUM_ANSWERS short traces that hold lines with a match, each followed by the answers that it leads to.

    Only answers are learned. Where a block has one, its other lines are there as well.

    Args:
      exclude: problems that are left out (a held-out set).
    """
    traces = []
    while len(traces) < NUM_ANSWERS:
        numbers = _numbers(rng)
        in_opening = rng.random() < 0.3
        steps = [((), numbers)] if in_opening else list(steps_from(numbers))
        problem = _problem(rng, numbers, steps[rng.integers(len(steps))][1])
        if problem is None or problem in exclude:
            continue
        tree = search(problem, beyond=False)
        program = str(rng.choice(list(RENDERINGS)))
        if in_opening != (tree.opening.solution is not None) or tree.solution is None:
            continue
        if in_opening:
            (span,) = RENDERINGS[program](tree)
            traces.append((_answer_only(span),))
            continue
        block = next(block for block in tree.blocks if any(line.solution for line in block))
        if program == "apr":
            traces += _called(problem, block)
        elif program == "sequential":
            traces.append(_line(problem, next(line for line in block if line.solution)))
        else:
            traces.append(_branches(problem, block, FORMATS[program]))
    return traces


def _numbers(rng: np.random.Generator) -> tuple[int, ...]:
    """Four numbers, equal ones and small ones more often than a problem has them."""
    numbers = rng.integers(APR.min_number, APR.max_number + 1, 4)
    kind = rng.random()
    if kind < 0.2:
        numbers[1] = numbers[0]
    elif kind < 0.5:
        numbers[:2] = rng.integers(1, 13, 2)
    return tuple(sorted(int(n) for n in numbers))


def _problem(rng: np.random.Generator, numbers: tuple[int, ...], values: tuple[int, ...]) -> Problem | None:
    """A problem of these numbers whose target the values make, by operations drawn of those that give a value.

    None: the target is out of bounds.
    """
    left = [values[i] for i in rng.permutation(len(values))] if len(values) == 3 else list(values)
    while len(left) > 1:
        made = [value for value in quad(left.pop(0), left.pop(0)) if value is not None]
        left.append(int(rng.choice(made)))
    (target,) = left
    return Problem(numbers, target) if APR.min_target <= target <= APR.max_target else None


def _answer_only(span: Span | Block) -> Span:
    """The span with all forced but what follows its match; all of it where it has none."""
    assert isinstance(span, Span)
    given = span.pieces.index(MATCH) + 1 if MATCH in span.pieces else len(span.pieces)
    return dataclasses.replace(span, forced=given)


def _line(problem: Problem, line: Line) -> Trace:
    """A line that matched, of one context."""
    pieces = [BOS, *prompt_pieces(problem, "sequential"), " ;", *line_pieces(line)]
    return (Span((*pieces, *answer_pieces(line.solution)), forced=len(pieces)),)


def _branches(problem: Problem, block: tuple[Line, ...], tags: Tags) -> Trace:
    """A block's branches, and what a parent says behind it."""
    won = next(i for i, line in enumerate(block) if line.solution is not None)
    branches = tuple(
        (_answer_only(branch_span(label, line, tags)),) for label, line in zip(LABELS, block, strict=False)
    )
    prompt = (BOS, *prompt_pieces(problem, tags.mode))
    pieces = [*tags.after_join, *tags.conclusion, LABELS[won], *tags.end, *tags.finish]
    return (
        Span(prompt, forced=len(prompt)),
        Block(branches, "prefill" if tags.join == "prefill" else "stitch", chosen=won),
        Span((*pieces, *answer_pieces(block[won].solution)), forced=len(tags.after_join)),
    )


def _called(problem: Problem, block: tuple[Line, ...]) -> list[Trace]:
    """The searches of APR's that matched, and a root to which all of the block's return."""
    nodes = list(enumerate(block))
    pieces = [BOS, *root_pieces(problem), *returned_pieces(nodes)]
    answer = next(line.solution for line in block if line.solution is not None)
    root = Span((*pieces, *answer_pieces(answer)), forced=len(pieces))
    return [(root,), *((_answer_only(search_span(i, line)),) for i, line in nodes if line.solution is not None)]
