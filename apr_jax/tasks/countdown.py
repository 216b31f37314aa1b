"""Countdown: reach a target with + - * / from all the given numbers. Problems, a complete solver, a checker.

A pair of values a >= b gives a + b, a - b, a * b and, where it is exact, a / b (b > 0): every value is a
non-negative integer. The problems follow APR's distribution: 4 integers uniform in [1, 99], a target uniform
in [10, 100], redrawn until solvable.

Source: Pan et al. 2025, Learning Adaptive Parallel Reasoning with Language Models (arXiv 2504.15466).
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Iterator

import numpy as np

OPERATORS = ("-", "+", "*", "/")
EQUATION = re.compile(r"^\s*(\d{1,9})\s*([-+*/])\s*(\d{1,9})\s*=\s*(\d{1,9})\s*$")  # Python's int has its limit


@dataclasses.dataclass(frozen=True)
class Problem:
    """`numbers` are sorted, ascending."""

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self):
        if len(self.numbers) < 2:
            raise ValueError(f"a problem needs at least 2 numbers, got {self.numbers}")
        if min(self.numbers) < 0 or self.target < 0:
            raise ValueError(f"numbers and target must be >= 0, got {self.numbers} -> {self.target}")
        object.__setattr__(self, "numbers", tuple(sorted(self.numbers)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemConfig:
    """Where problems are drawn from. Bounds are inclusive; the defaults are APR's."""

    num_numbers: int = 4
    min_number: int = 1
    max_number: int = 99
    min_target: int = 10
    max_target: int = 100


APR = ProblemConfig()
MAX_DRAWS = 100_000  # of one problem


@dataclasses.dataclass(frozen=True)
class Equation:
    """left (operator) right = value."""

    left: int
    operator: str
    right: int
    value: int

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.value}"

    @property
    def holds(self) -> bool:
        """Whether the arithmetic is exact."""
        match self.operator:
            case "+":
                return self.value == self.left + self.right
            case "-":
                return self.value == self.left - self.right
            case "*":
                return self.value == self.left * self.right
        return self.right != 0 and self.left == self.value * self.right


def combine(a: int, b: int) -> Iterator[Equation]:
    """All equations that a pair of values allows, larger operand first."""
    a, b = max(a, b), min(a, b)
    yield Equation(a, "-", b, a - b)
    yield Equation(a, "+", b, a + b)
    yield Equation(a, "*", b, a * b)
    if b > 0 and a % b == 0:
        yield Equation(a, "/", b, a // b)


def needed(target: int, value: int) -> set[int]:
    """All that gives the target when combined with the value; if both are 0 anything does, which is not listed."""
    others = {target - value, value - target, target + value}
    if value > 0:
        others.add(target * value)
        if target % value == 0:
            others.add(target // value)
    if target > 0 and value % target == 0 and value > 0:
        others.add(value // target)
    return {other for other in others if other >= 0}


@functools.cache
def _index_parts(count: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Ways to part so many things in two, the smaller part first; each once."""
    indices = range(count)
    halves = (c for size in range(1, count // 2 + 1) for c in itertools.combinations(indices, size))
    return tuple((c, tuple(i for i in indices if i not in c)) for c in halves if 2 * len(c) < count or 0 in c)


def _parts(values: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for left, right in _index_parts(len(values)):
        yield tuple([values[i] for i in left]), tuple([values[i] for i in right])


@functools.lru_cache(maxsize=1024)
def _reachable(values: tuple[int, ...]) -> frozenset[int]:
    """All that combining all the values can give."""
    if len(values) == 1:
        return frozenset(values)
    reached: set[int] = set()
    for left, right in _parts(values):
        for x in _reachable(left):
            for y in _reachable(right):
                a, b = (x, y) if x >= y else (y, x)
                reached.update((a - b, a + b, a * b))
                if b > 0 and a % b == 0:
                    reached.add(a // b)
    return frozenset(reached)


def is_solvable(values: tuple[int, ...], target: int) -> bool:
    """Whether combining all the values can give the target. Complete."""
    if len(values) <= 3:
        return target in _reachable(values)
    for left, right in _parts(values):
        for value in _reachable(left):
            others = needed(target, value)
            if value == target == 0:
                return True
            if len(right) <= 3:
                if not others.isdisjoint(_reachable(right)):
                    return True
            elif any(is_solvable(right, other) for other in others):
                return True
    return False


def solve(problem: Problem) -> list[Equation] | None:
    """Equations that use every number once and end in the target; None if there are none. Complete."""
    if not is_solvable(problem.numbers, problem.target):
        return None
    values, equations = list(problem.numbers), []
    while len(values) > 1:
        equation, values = next(
            (equation, rest)
            for i, j in itertools.combinations(range(len(values)), 2)
            for equation in combine(values[i], values[j])
            for rest in [[*values[:i], *values[i + 1 : j], *values[j + 1 :], equation.value]]
            if (is_solvable(tuple(rest), problem.target) if len(rest) > 1 else rest == [problem.target])
        )
        equations.append(equation)
    return equations


def check_equations(problem: Problem, equations: list[Equation]) -> str | None:
    """Replays a solution.

    Returns:
      None if every operand was available, the arithmetic is exact, all numbers are used up and the last value
      is the target; otherwise what is wrong.
    """
    available = list(problem.numbers)
    for equation in equations:
        for operand in (equation.left, equation.right):
            if operand not in available:
                return f"{equation}: {operand} is not available in {sorted(available)}"
            available.remove(operand)
        if not equation.holds:
            return f"{equation} does not hold"
        available.append(equation.value)
    if len(available) > 1:
        return f"{sorted(available)} are left, all numbers must be used"
    if available[0] != problem.target:
        return f"ends in {available[0]}, not in {problem.target}"
    return None


def parse_equations(text: str) -> list[Equation] | None:
    """Reads `a - b = c , d * e = f`; None if a piece between commas is not an equation."""
    equations = []
    for piece in text.split(","):
        match = EQUATION.match(piece)
        if match is None:
            return None
        left, operator, right, value = match.groups()
        equations.append(Equation(int(left), operator, int(right), int(value)))
    return equations


def draw_problem(seed: int, index: int, config: ProblemConfig = APR, exclude: Collection[Problem] = ()) -> Problem:
    """Problem number `index` of the stream `seed`; depends on nothing else, so that any worker may draw it.

    Args:
      exclude: problems that are never drawn (a held-out set).

    Raises:
      ValueError: so many draws gave none that is solvable.
    """
    rng = np.random.default_rng((seed, index))
    for _ in range(MAX_DRAWS):
        numbers = rng.integers(config.min_number, config.max_number + 1, config.num_numbers)
        target = int(rng.integers(config.min_target, config.max_target + 1))
        problem = Problem(tuple(int(n) for n in numbers), target)
        if problem not in exclude and is_solvable(problem.numbers, target):
            return problem
    raise ValueError(f"{MAX_DRAWS:,} draws gave no solvable problem of {config}")


def draw_problems(seed: int, count: int, config: ProblemConfig = APR) -> list[Problem]:
    """The first `count` different problems of the stream `seed`."""
    problems: dict[Problem, None] = {}
    for index in itertools.count():
        if len(problems) == count:
            return list(problems)
        problems[draw_problem(seed, index, config)] = None
    raise AssertionError("unreachable")
