"""Problems, solver and checker of Countdown."""

import dataclasses
import itertools
import operator
import subprocess
import sys
from fractions import Fraction

import pytest

from apr_jax.tasks.countdown import (
    APR,
    Equation,
    Problem,
    ProblemConfig,
    check_equations,
    draw_problem,
    draw_problems,
    is_solvable,
    parse_equations,
    solve,
)
from apr_jax.tasks.countdown_task import TASKS


def brute_force(numbers: tuple[int, ...], target: int) -> bool:
    """All orders, operators and shapes of trees, in exact fractions; intermediate values natural."""

    def shapes(values):
        if len(values) == 1:
            yield Fraction(values[0])
            return
        for cut in range(1, len(values)):
            for left, right in itertools.product(shapes(values[:cut]), shapes(values[cut:])):
                for apply in (operator.add, operator.sub, operator.mul, operator.truediv):
                    if apply is operator.truediv and right == 0:
                        continue
                    value = apply(left, right)
                    if value >= 0 and value.denominator == 1:
                        yield value

    return any(target in shapes(order) for order in set(itertools.permutations(numbers)))


@pytest.mark.parametrize(
    ("numbers", "target"),
    [
        ((1, 2, 3), 7), ((1, 1, 1), 3), ((1, 1, 1), 4), ((2, 3, 5), 30), ((2, 3, 5), 29), ((4, 6, 8), 3),
        ((7, 7), 0), ((5, 5, 9), 9), ((5, 5, 9), 8), ((6, 2, 12), 1), ((3, 8, 8, 3), 24), ((1, 5, 5, 5), 24),
        ((13, 17, 19, 2), 97),
    ],
)  # fmt: skip
def test_solver_equals_brute_force(numbers, target):
    problem = Problem(numbers, target)
    solution = solve(problem)
    assert is_solvable(problem.numbers, target) == (solution is not None) == brute_force(numbers, target)
    if solution is not None:
        assert check_equations(problem, solution) is None


def test_numbers_beyond_all_reason_are_wrong_and_no_error():
    task = TASKS["countdown"]
    problem = task.problems(1, seed=1)[0]
    long = "9" * 5000
    assert not task.check(problem, f" => 5 + 3 = {long}").correct
    assert task.measure(problem, [f" 5 3 = 2 8 {long} . , 5 {long} = 1 1 1 1"])["wrong_equations"] == 1


def test_solver_equals_brute_force_on_drawn_numbers():
    found = []
    for i in range(12):
        base = draw_problem(3, i, dataclasses.replace(APR, num_numbers=3, max_number=20, min_target=1))
        for target in (base.target, base.target + 1, base.target + 5):
            found.append(is_solvable(base.numbers, target))
            assert found[-1] == brute_force(base.numbers, target)
    assert {True, False} == set(found)


def test_problems_follow_the_distribution():
    problems = draw_problems(11, 300)
    assert len(set(problems)) == 300
    assert all(len(p.numbers) == 4 and list(p.numbers) == sorted(p.numbers) for p in problems)
    assert all(1 <= n <= 99 for p in problems for n in p.numbers)
    assert all(10 <= p.target <= 100 for p in problems)
    assert all(is_solvable(p.numbers, p.target) for p in problems)
    # solvable problems lean to small numbers, but every decade is there
    for values, decades in (
        ([n for p in problems for n in p.numbers], 10),
        ([p.target for p in problems], 9),
    ):
        shares = [sum(1 for v in values if v // 10 == i) / len(values) for i in range(10 - decades, 10)]
        assert all(0.5 / decades < share < 2 / decades for share in shares), shares
    with pytest.raises(ValueError, match=r"100,000 draws gave no solvable problem of .*max_number=1"):
        draw_problem(0, 0, ProblemConfig(num_numbers=3, max_number=1, min_target=900, max_target=999))


def test_a_problem_depends_on_seed_and_index_alone():
    expected = [draw_problem(5, i) for i in range(6)]
    assert [draw_problem(5, i) for i in reversed(range(6))] == expected[::-1]
    assert draw_problem(6, 0) != expected[0]
    code = "from apr_jax.tasks.countdown import draw_problem; print([draw_problem(5, i) for i in range(6)])"
    other_process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other_process.stdout.strip() == repr(expected)


def test_excluded_problems_are_redrawn():
    first = draw_problem(5, 0)
    other = draw_problem(5, 0, exclude={first})
    assert other != first and is_solvable(other.numbers, other.target)


PROBLEM = Problem((53, 22, 31, 26), 27)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("31 - 26 = 5 , 5 + 22 = 27 , 53 - 27 = 26", "ends in 26"),
        ("31 - 26 = 5 , 5 + 22 = 27", "are left"),
        ("31 - 26 = 6 , 6 + 22 = 28 , 53 - 28 = 25", "does not hold"),
        ("31 - 31 = 0 , 0 + 22 = 22 , 53 - 22 = 31", "31 is not available"),
        ("26 - 31 = 5 , 5 + 22 = 27 , 53 - 27 = 26", "does not hold"),
        ("53 / 22 = 2 , 31 - 26 = 5 , 5 * 2 = 10", "does not hold"),
        ("53 - 31 = 22 , 22 - 22 = 0 , 26 / 0 = 0", "does not hold"),
        ("53 - 99 = 27", "99 is not available"),
    ],
)
def test_checker_refuses(text, complaint):
    equations = parse_equations(text)
    assert equations is not None
    assert complaint in (check_equations(PROBLEM, equations) or "")


def test_checker_accepts_any_order_of_numbers():
    solution = parse_equations("53-31=22,22/22 = 1 , 1 + 26 = 27")
    assert solution == [Equation(53, "-", 31, 22), Equation(22, "/", 22, 1), Equation(1, "+", 26, 27)]
    assert check_equations(PROBLEM, solution) is None


@pytest.mark.parametrize("text", ["", "none", "1 + 2", "1 + 2 = 3 ,", "1 + -2 = 3", "a + 1 = 2", "1 ^ 2 = 3"])
def test_parsing_refuses_what_is_no_equation(text):
    assert parse_equations(text) is None


def test_a_problem_names_what_is_wrong():
    with pytest.raises(ValueError, match="at least 2 numbers"):
        Problem((3,), 3)
    with pytest.raises(ValueError, match=">= 0"):
        Problem((3, -1), 3)
