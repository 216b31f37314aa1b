"""The search: what it finds is right, and what it misses has a reason."""

import itertools

import pytest

from apr_jax.tasks.countdown import APR, Problem, ProblemConfig, check_equations, combine, draw_problem, draw_problems
from apr_jax.tasks.countdown_renderings import RENDERINGS
from apr_jax.tasks.countdown_search import MAX_VALUE, compare, hardness, needing, quad, search
from apr_jax.tasks.countdown_sets import HARD_STATES, ProblemSet

PROBLEMS = draw_problems(21, 150)


def reachable_within(values: tuple[int, ...], target: int) -> bool:
    """Whether the target can be reached with no value above MAX_VALUE and no zero as a factor or divisor."""
    if len(values) == 1:
        return values[0] == target
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            rest = values[:i] + values[i + 1 : j] + values[j + 1 :]
            for e in combine(values[i], values[j]):
                zero_factor = e.operator in "*/" and 0 in (e.left, e.right)
                if e.value <= MAX_VALUE and not zero_factor and reachable_within((*rest, e.value), target):
                    return True
    return False


def test_search_is_complete_within_its_bounds():
    outcomes = set()
    for problem in PROBLEMS[:60]:
        found = search(problem).solution is not None
        assert found == reachable_within(problem.numbers, problem.target), problem
        outcomes.add(found)
    assert outcomes == {True, False}


@pytest.mark.parametrize("num_numbers", [3, 4, 5, 6])
def test_every_solution_of_every_line_replays(num_numbers):
    for index in range(25):
        config = ProblemConfig(num_numbers=num_numbers, max_target=999 if index % 2 else 100)
        problem = draw_problem(22, index, config)
        for line in search(problem).lines:
            assert len(line.steps) + len(line.values) == num_numbers
            if line.solution is not None:
                assert check_equations(problem, list(line.solution)) is None
            assert [r.slot is not None for r in line.rounds[:-1]] == [False] * (len(line.rounds) - 1)
            assert (line.rounds[-1].slot is not None) == (line.solution is not None)


def test_steps_lead_to_the_values_that_are_left():
    for problem in PROBLEMS[:40]:
        for line in search(problem).lines[1:]:
            left = sorted([*line.values[:-1], line.steps[0].left, line.steps[0].right])
            assert tuple(left) == problem.numbers and line.values[-1] == line.steps[0].value and line.steps[0].holds


def test_most_problems_are_solved_and_nearly_half_at_once():
    trees = [search(problem) for problem in PROBLEMS]
    assert 0.85 < sum(tree.solution is not None for tree in trees) / len(trees) < 1
    assert 0.35 < sum(tree.opening.solution is not None for tree in trees) / len(trees) < 0.65


def test_hardness_counts_the_states_of_a_complete_search():
    for problem in PROBLEMS:  # every problem of APR's distribution is solvable: a complete search finds it
        tree = search(problem)
        solved = [i for i, line in enumerate(tree.lines, 1) if line.solution is not None]
        assert 1 <= hardness(problem) <= 1 + 24
        if solved and hardness(problem) == 1:
            assert solved[0] == 1
    assert hardness(Problem((22, 26, 31, 53), 27)) == 2
    unsolvable = Problem((1, 1, 1, 1), 99)
    assert hardness(unsolvable) == len(search(unsolvable).lines) + 1
    assert APR.num_numbers == 4


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (4, 31, (27, 35, 124, None)),
        (31, 31, (0, 62, None, 1)),
        (7, 0, (7, 7, None, None)),
        (90, 120, (30, None, None, None)),
        (6, 30, (24, 36, 180, 5)),
    ],
)
def test_quad(x, y, expected):
    assert quad(x, y) == quad(y, x) == expected


def test_needed_equations_hold():
    for x in (1, 2, 5, 12, 27, 60, 99):
        for y in (1, 3, 6, 12, 54, 99):
            for slot, value in enumerate(quad(x, y)):
                if value is not None:
                    needed = needing(x, y, slot, value)
                    assert needed.holds and needed.value == x
                    assert sorted((needed.left, needed.right)) == sorted((value, y))


def test_nearest_made_values_are_listed_up_to_the_first_match():
    # made: 66 122; needed: 5 17 66 .
    assert compare((28, 94), 6, 11).nearest == (66, 66, 66) and compare((28, 94), 6, 11).slot == 2
    # made: 70 126; needed: 9 13 22 .
    assert compare((28, 98), 2, 11).nearest == (70, 70, 70, None) and compare((28, 98), 2, 11).slot is None


@pytest.mark.parametrize(
    ("numbers", "target", "message"),
    [
        ((1, 2), 3, "3 to 6 integers"),
        ((1, 2, 3, 100), 5, "in \\[1, 99\\]"),
        ((1, 2, 3, 4), 1000, "in \\[1, 999\\]"),
    ],
)
def test_search_refuses_what_it_cannot_write(numbers, target, message):
    with pytest.raises(ValueError, match=message):
        search(Problem(numbers, target))


def test_a_search_that_stops_behind_its_match_is_written_the_same():
    for problem in PROBLEMS[:60]:
        whole, short = search(problem), search(problem, beyond=False)
        assert short.solution == whole.solution and short.lines == whole.lines[: len(short.lines)]
        for render in RENDERINGS.values():
            assert render(short) == render(whole)
        if whole.opening.solution is not None:
            assert short.blocks == ()


def test_difficulty_is_a_dial():
    large = ProblemConfig(num_numbers=6, min_number=5, min_target=500, max_target=999)
    for problem in itertools.islice(ProblemSet(config=large, min_hardness=3).draw(7), 20):
        assert len(problem.numbers) == 6 and min(problem.numbers) >= 5 and 500 <= problem.target <= 999
        assert hardness(problem) >= 3
    drawn = [hardness(problem) for problem in itertools.islice(ProblemSet().draw(3), 1000)]
    assert 0.17 < sum(states >= HARD_STATES for states in drawn) / len(drawn) < 0.24, "the hardest fifth"
    few = ProblemSet(config=ProblemConfig(num_numbers=3, max_number=2, min_target=1, max_target=3))
    with pytest.raises(ValueError, match="20,000 draws behind problem"):
        list(few.draw(0))


@pytest.mark.parametrize(
    ("dial", "message"),
    [
        ({"num_numbers": 7}, r"num_numbers is 7, must be in \[3, 6\]"),
        ({"max_number": 100}, r"max_number is 100, must be in \[1, 99\]"),
        ({"min_target": 200}, r"max_target is 100, must be in \[200, 999\]"),
        ({"max_target": 1000}, r"max_target is 1000, must be in \[10, 999\]"),
    ],
)
def test_a_set_that_the_search_cannot_write_is_refused(dial, message):
    with pytest.raises(ValueError, match=message):
        ProblemSet(config=ProblemConfig(**dial))
