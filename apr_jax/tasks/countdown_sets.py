"""The held-out sets: the first problems of a kind under one seed, never trained on.

apr     1,000 problems of APR's distribution
hard    1,000 problems with 4 numbers from the hardest quarter, 24 of 100: the search looks at 5 states or more; six in
        seven of them are of the hardest fifth, 6 states or more
five    500 problems with 5 numbers
"""

import functools
import itertools
from collections.abc import Iterator

from apr_jax.tasks.countdown import APR, Problem, ProblemConfig, draw_problem
from apr_jax.tasks.countdown_search import hardness

FIVE = ProblemConfig(num_numbers=5)
HARD_STATES = 5  # of APR's distribution 23.8% need so many, 20.5% need 6
HELD_OUT_SEED = 1
SIZES = {"apr": 1000, "hard": 1000, "five": 500}


def draw_set(name: str, seed: int) -> Iterator[Problem]:
    """Different problems of a set's kind, without end.

    Raises:
      ValueError: there is no such set.
    """
    if name not in SIZES:
        raise ValueError(f"set {name!r} is not one of {', '.join(SIZES)}")
    seen: set[Problem] = set()
    for index in itertools.count():
        problem = draw_problem(seed, index, FIVE if name == "five" else APR)
        if problem not in seen and (name != "hard" or hardness(problem) >= HARD_STATES):
            seen.add(problem)
            yield problem


@functools.cache
def held_out_problems(name: str) -> tuple[Problem, ...]:
    """All problems of a set. Raises ValueError: there is no such set."""
    return tuple(itertools.islice(draw_set(name, HELD_OUT_SEED), SIZES.get(name, 0)))
