"""One search over a four-number problem, from both ends, as a reasoning tree that two renderings write down.

The one primitive is the *quad* of two values: difference, sum, product, quotient (None where the quotient is
not exact, an operand of product or quotient is zero, or the value exceeds `MAX_VALUE`). The quad of two
numbers is what they can *make*. The quad of a target and a number is what is *needed* to reach that target
with the number: x makes t with c exactly if x is in quad(t, c). So a match between a made quad and a needed
quad is a solution, and all the arithmetic of the trace is this one function.

    split   a, b | c, d      made: quad(c, d); needed: quad(t, m) for every m in quad(a, b)
    lemma   one of quad(t, n) for a number n left for last: reach that value with the three other numbers,
            by three choices of the second last number: made: quad of the other two

Order: the split of the two smallest and two largest numbers (solves about half of all problems); then the
lemmas that subtract or divide; then those that add or multiply, and the two other splits.
"""

import dataclasses

from apr_jax.tasks.countdown import Equation, Problem

MAX_VALUE = 199
Quad = tuple[int | None, int | None, int | None, int | None]
Pair = tuple[int, int]


def quad(x: int, y: int) -> Quad:
    """Difference, sum, product and quotient of two values, the larger first."""
    x, y = max(x, y), min(x, y)
    product = x * y if y > 0 and x * y <= MAX_VALUE else None
    return x - y, x + y if x + y <= MAX_VALUE else None, product, x // y if y and x % y == 0 else None


def making(x: int, y: int, slot: int) -> Equation:
    """The equation behind slot `slot` of quad(x, y)."""
    x, y = max(x, y), min(x, y)
    value = quad(x, y)[slot]
    assert value is not None
    return Equation(x, "-+*/"[slot], y, value)


def needing(target: int, number: int, slot: int) -> Equation:
    """The equation that reaches `target` from `number` and slot `slot` of quad(target, number)."""
    value = quad(target, number)[slot]
    assert value is not None
    if slot == 1:
        return Equation(value, "-", number, target)
    if slot == 2:
        return Equation(value, "/", number, target)
    operators = "+-" if slot == 0 else "*/"
    return Equation(number, operators[0 if target >= number else 1], value, target)


@dataclasses.dataclass(frozen=True)
class Round:
    """One comparison of what `pair` makes with what is needed for `target` beside `number`.

    `nearest` holds, for every needed value, the made value closest to it (the first of several), up to the first
    that is equal. `slots` is then (slot of the needed quad, slot of the made quad), a match.
    """

    pair: Pair
    target: int
    number: int
    nearest: tuple[int | None, ...]
    slots: tuple[int, int] | None


def compare(pair: Pair, target: int, number: int) -> Round:
    made, needed = quad(*pair), quad(target, number)
    values = [value for value in made if value is not None]
    nearest = [None if x is None else min(values, key=lambda y: abs(x - y)) for x in needed]
    for slot, value in enumerate(needed):
        if value is not None and value == nearest[slot]:
            return Round(pair, target, number, tuple(nearest[: slot + 1]), (slot, made.index(value)))
    return Round(pair, target, number, tuple(nearest), None)


@dataclasses.dataclass(frozen=True)
class Line:
    """A state of the search: rounds up to the first match, and the equations that follow from it.

    `first` is a split's first pair (the rounds' numbers are what it makes), None for a lemma;
    `last` is a lemma's closing equation (it ends in the problem's target), None for a split.
    """

    first: Pair | None
    last: Equation | None
    rest: tuple[int, ...]
    rounds: tuple[Round, ...]
    solution: tuple[Equation, ...] | None


def _until_match(rounds) -> tuple[Round, ...]:
    kept = []
    for each in rounds:
        kept.append(each)
        if each.slots is not None:
            break
    return tuple(kept)


def split_line(first: Pair, second: Pair, target: int) -> Line:
    rounds = _until_match(compare(second, target, m) for m in quad(*first) if m is not None)
    solution, final = None, rounds[-1]
    if final.slots is not None:
        needed_slot, made_slot = final.slots
        solution = (
            making(*first, quad(*first).index(final.number)),
            making(*second, made_slot),
            needing(target, final.number, needed_slot),
        )
    return Line(first, None, second, rounds, solution)


def lemma_line(number: int, slot: int, rest: tuple[int, ...], target: int) -> Line:
    last = needing(target, number, slot)
    goal = quad(target, number)[slot]
    assert goal is not None
    p, q, r = rest
    rounds = _until_match(compare(pair, goal, c) for pair, c in (((q, r), p), ((p, r), q), ((p, q), r)))
    solution, final = None, rounds[-1]
    if final.slots is not None:
        needed_slot, made_slot = final.slots
        solution = (making(*final.pair, made_slot), needing(goal, final.number, needed_slot), last)
    return Line(None, last, rest, rounds, solution)


@dataclasses.dataclass(frozen=True)
class ReasoningTree:
    """The whole search, no line left out after a success: a rendering stops where its rules say.

    `opening` is tried first; `blocks` hold lines that do not depend on each other, tried block by block.
    """

    problem: Problem
    opening: Line
    blocks: tuple[tuple[Line, ...], ...]

    @property
    def solution(self) -> tuple[Equation, ...] | None:
        """The first solution in the search's order."""
        lines = [self.opening, *(line for block in self.blocks for line in block)]
        return next((line.solution for line in lines if line.solution is not None), None)


def search(problem: Problem) -> ReasoningTree:
    """Searches a problem of four numbers, each at most 99, with a target of at most 100.

    Raises:
      ValueError: a problem outside these bounds (intermediate values must stay writable).
    """
    if len(problem.numbers) != 4 or min(problem.numbers) < 1 or max(problem.numbers) > 99:
        raise ValueError(f"numbers are {problem.numbers}, must be 4 integers in [1, 99]")
    if not 1 <= problem.target <= 100:
        raise ValueError(f"target is {problem.target}, must be in [1, 100]")
    numbers, target = problem.numbers, problem.target
    a, b, c, d = numbers

    def lemmas(*slots: int) -> list[Line]:
        return [
            lemma_line(numbers[i], slot, numbers[:i] + numbers[i + 1 :], target)
            for slot in slots
            for i in (3, 2, 1, 0)
            if quad(target, numbers[i])[slot] is not None
        ]

    later = [*lemmas(1, 2), split_line((a, c), (b, d), target), split_line((a, d), (b, c), target)]
    return ReasoningTree(problem, split_line((a, b), (c, d), target), (tuple(lemmas(0, 3)), tuple(later)))
