"""One search over a Countdown problem as a reasoning tree, which several renderings write down.

The one primitive is the *quad* of two values: difference, sum, product, quotient (None where the quotient is
not exact, an operand of product or quotient is zero, or the value exceeds the bound). The quad of two
numbers is what they can *make*. The quad of a target and a number is what is *needed* to reach that target
with the number: x makes t with c exactly if x is in quad(t, c). So a match between a made quad and a needed
quad is a solution, and all the arithmetic of the trace is this one function.

A *line* looks at one state, what is left of the numbers after some steps (equations):

    three values a, b, c    made by each pair, needed with the third value: three rounds, complete
    four values a, b, c, d  made by c and d, needed with whatever a and b make: up to four rounds

The opening looks at the problem itself; where it fails, lines with one step more follow in blocks of at most
`BLOCK_SIZE`, by operator (`/ - + *`), the larger numbers first: the best order of its kind for the first block. For
four numbers the search is complete but for the bound on values and for products with 0. Five numbers are brought to
four by each line, six by a line's step and the first step that its result allows.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from apr_jax.tasks.countdown import Equation, Problem, combine

MAX_VALUE = 199  # of what is written down, unless the target is larger
MAX_LARGE_VALUE = 999
MAX_NUMBER = 99
NUM_NUMBERS = range(3, 7)
BLOCK_SIZE = 5
MAX_LINES = 24  # beside the opening
Quad = tuple[int | None, int | None, int | None, int | None]
Pair = tuple[int, int]


def quad(x: int, y: int, max_value: int = MAX_VALUE) -> Quad:
    """Difference, sum, product and quotient of two values, the larger first."""
    x, y = max(x, y), min(x, y)
    product = x * y if y > 0 and x * y <= max_value else None
    return x - y, x + y if x + y <= max_value else None, product, x // y if y and x % y == 0 else None


def making(x: int, y: int, value: int, max_value: int = MAX_VALUE) -> Equation:
    """The first equation by which x and y make the value."""
    x, y = max(x, y), min(x, y)
    return Equation(x, "-+*/"[quad(x, y, max_value).index(value)], y, value)


def needing(target: int, number: int, slot: int, value: int) -> Equation:
    """The equation that reaches `target` from `number` and the value in slot `slot` of quad(target, number)."""
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
    that is equal. `slot` is then the slot of the needed quad in which it stands.
    """

    pair: Pair
    target: int
    number: int
    made: Quad
    needed: Quad
    nearest: tuple[int | None, ...]
    slot: int | None

    @property
    def equations(self) -> tuple[Equation, Equation]:
        """The last two equations of the solution that a match gives."""
        assert self.slot is not None
        value = self.needed[self.slot]
        assert value is not None
        made = Equation(max(self.pair), "-+*/"[self.made.index(value)], min(self.pair), value)
        return made, needing(self.target, self.number, self.slot, value)


def compare(pair: Pair, target: int, number: int, max_value: int = MAX_VALUE) -> Round:
    made, needed = quad(*pair, max_value), quad(target, number, max_value)
    values = [value for value in made if value is not None]
    nearest: list[int | None] = []
    for slot, value in enumerate(needed):
        if value is not None and value in values:
            return Round(pair, target, number, made, needed, (*nearest, value), slot)
        nearest.append(None if value is None else _closest(values, value))
    return Round(pair, target, number, made, needed, tuple(nearest), None)


def _closest(values: list[int], wanted: int) -> int:
    """The first of the values that are closest. With `min` and a key a search takes twice as long."""
    best = values[0]
    for value in values:
        if abs(value - wanted) < abs(best - wanted):
            best = value
    return best


@dataclasses.dataclass(frozen=True)
class Line:
    """A state of the search: rounds up to the first match.

    Attributes:
      steps: equations that lead to the state, in order.
      values: what is left: numbers in the problem's order, then results in the steps' order; 3 or 4.
      target: of the problem.
      first: of four values, what the first two make; None for three.
    """

    steps: tuple[Equation, ...]
    values: tuple[int, ...]
    target: int
    first: Quad | None
    rounds: tuple[Round, ...]

    @functools.cached_property
    def solution(self) -> tuple[Equation, ...] | None:
        """Equations from the problem's numbers to the target; None if no round matches."""
        if self.rounds[-1].slot is None:
            return None
        number, ends = self.rounds[-1].number, self.rounds[-1].equations
        if self.first is None:
            return (*self.steps, *ends)
        a, b = max(self.values[:2]), min(self.values[:2])
        return (*self.steps, Equation(a, "-+*/"[self.first.index(number)], b, number), *ends)


def look_at(steps: tuple[Equation, ...], values: tuple[int, ...], target: int, max_value: int = MAX_VALUE) -> Line:
    """The line of a state of three or four values."""
    if len(values) == 3:
        a, b, c = values
        first, states = None, [((a, b), c), ((a, c), b), ((b, c), a)]
    else:
        a, b, c, d = values
        first = quad(a, b, max_value)
        states = [((c, d), x) for x in first if x is not None]
    rounds = []
    for pair, number in states:
        rounds.append(compare(pair, target, number, max_value))
        if rounds[-1].slot is not None:
            break
    return Line(steps, values, target, first, tuple(rounds))


def steps_from(values: tuple[int, ...], max_value: int = MAX_VALUE) -> Iterator[tuple[Equation, tuple[int, ...]]]:
    """First steps from a state, each once, in the search's order; and the state that each leads to.

    Left out are values beyond the bound, and products and quotients with 0 and 1: they leave a number as it is, which
    a round's quads do as well.
    """
    seen = set()
    pairs = [(i, j, tuple(combine(values[i], values[j]))) for i, j in itertools.combinations(range(len(values)), 2)]
    for operator in "/-+*":
        for i, j, steps in reversed(pairs):
            step = next((step for step in steps if step.operator == operator), None)
            if step is None or step.value > max_value or (operator in "*/" and step.right <= 1) or step in seen:
                continue
            seen.add(step)
            yield step, (*values[:i], *values[i + 1 : j], *values[j + 1 :], step.value)


@dataclasses.dataclass(frozen=True)
class ReasoningTree:
    """A search, as a rule with the lines beyond its success: a rendering stops where its rules say.

    `opening` is tried first; `blocks` hold lines that do not depend on each other, tried block by block.
    """

    problem: Problem
    opening: Line
    blocks: tuple[tuple[Line, ...], ...]

    @property
    def lines(self) -> list[Line]:
        """All lines in the search's order, the opening first."""
        return [self.opening, *(line for block in self.blocks for line in block)]

    @property
    def solution(self) -> tuple[Equation, ...] | None:
        """The first solution in the search's order."""
        return next((line.solution for line in self.lines if line.solution is not None), None)


def all_lines(problem: Problem, max_value: int) -> Iterator[Line]:
    """The lines of the search, one by one, the opening first."""
    numbers, target = problem.numbers, problem.target
    if len(numbers) <= 4:
        yield look_at((), numbers, target, max_value)
    if len(numbers) == 3:
        return
    for step, values in steps_from(numbers, max_value):
        steps = (step,)
        if len(values) == 5:
            second = next(steps_from(values, max_value), None)
            if second is None:
                continue
            steps, values = (step, second[0]), second[1]
        yield look_at(steps, values, target, max_value)


def max_value_of(problem: Problem) -> int:
    """The largest value that the problem's trace writes down."""
    return MAX_VALUE if problem.target <= MAX_VALUE else MAX_LARGE_VALUE


def search(problem: Problem, beyond: bool = True) -> ReasoningTree:
    """Searches a problem.

    Args:
      beyond: False leaves out the blocks behind the first that holds a match, or all where the opening does: no
        rendering writes them.

    Raises:
      ValueError: not 3 to 6 numbers in [1, 99], or a target outside [1, 999]: values must stay writable.
    """
    if len(problem.numbers) not in NUM_NUMBERS or min(problem.numbers) < 1 or max(problem.numbers) > MAX_NUMBER:
        raise ValueError(f"numbers are {problem.numbers}, must be 3 to 6 integers in [1, {MAX_NUMBER}]")
    if not 1 <= problem.target <= MAX_LARGE_VALUE:
        raise ValueError(f"target is {problem.target}, must be in [1, {MAX_LARGE_VALUE}]")
    lines = itertools.islice(all_lines(problem, max_value_of(problem)), MAX_LINES + 1)
    opening, blocks = next(lines), []
    solved = opening.solution is not None
    while (beyond or not solved) and (block := tuple(itertools.islice(lines, BLOCK_SIZE))):
        blocks.append(block)
        solved = solved or any(line.solution for line in block)
    return ReasoningTree(problem, opening, tuple(blocks))


def hardness(problem: Problem) -> int:
    """How many states the search looks at up to its first solution when values have no bound.

    For three and four numbers that search is complete but for products with 0. Where it finds nothing: all states and
    one more.
    """
    count = 0
    for count, line in enumerate(all_lines(problem, 10**9), 1):
        if line.solution is not None:
            return count
    return count + 1
