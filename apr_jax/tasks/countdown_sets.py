"""Sets of problems: how hard they are is a dial, and three settings of it are held out, never trained on.

apr     1,000 problems of APR's distribution
hard    1,000 problems with 4 numbers from the hardest fifth: the search looks at 6 states or more
five    500 problems with 5 numbers

A set's problems under seed 1 are the held-out ones.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from apr_jax.config import check
from apr_jax.tasks.countdown import APR, Problem, ProblemConfig, draw_problem
from apr_jax.tasks.countdown_search import MAX_LARGE_VALUE, MAX_LINES, MAX_NUMBER, NUM_NUMBERS, hardness

HARD_STATES = 6  # of APR's distribution 20.5% need so many, 23.8% need 5
HELD_OUT_SEED = 1
MAX_MISSES = 20_000  # problems in a row that are not new or not hard enough


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """All problems of a kind; those that the search can write down.

    Attributes:
      config: what they are drawn from.
      min_hardness: states that the search has to look at, see `hardness`. What is written ends after MAX_LINES + 1;
        of 5 and 6 numbers most problems with many states are such as the search never solves.
    """

    config: ProblemConfig = APR
    min_hardness: int = 1

    def __post_init__(self):
        config = self.config
        smallest, largest = min(NUM_NUMBERS), max(NUM_NUMBERS)
        _check_range("num_numbers", config.num_numbers, smallest, largest)
        _check_range("min_number", config.min_number, 1, MAX_NUMBER)
        _check_range("max_number", config.max_number, config.min_number, MAX_NUMBER)
        _check_range("min_target", config.min_target, 1, MAX_LARGE_VALUE)
        _check_range("max_target", config.max_target, config.min_target, MAX_LARGE_VALUE)
        _check_range("min_hardness", self.min_hardness, 1, MAX_LINES + 2)

    def draw(self, seed: int) -> Iterator[Problem]:
        """Different problems, without end.

        Raises:
          ValueError: so many draws in a row gave nothing new that there may be no more.
        """
        seen: set[Problem] = set()
        misses = 0
        for index in itertools.count():
            problem = draw_problem(seed, index, self.config)
            misses += 1
            if problem not in seen and (self.min_hardness == 1 or hardness(problem) >= self.min_hardness):
                seen.add(problem)
                yield problem
                misses = 0
            if misses == MAX_MISSES:
                raise ValueError(f"{misses:,} draws behind problem {len(seen):,} gave no other of {self}")


def _check_range(name: str, value: int, smallest: int, largest: int) -> None:
    check(smallest <= value <= largest, f"{name} is {value}, must be in [{smallest}, {largest}]")


SETS = {
    "apr": ProblemSet(),
    "hard": ProblemSet(min_hardness=HARD_STATES),
    "five": ProblemSet(config=ProblemConfig(num_numbers=5)),
}
SIZES = {"apr": 1000, "hard": 1000, "five": 500}


@functools.cache
def held_out_problems(name: str) -> tuple[Problem, ...]:
    """All held-out problems of a set, one of `SETS`."""
    return tuple(itertools.islice(SETS[name].draw(HELD_OUT_SEED), SIZES[name]))
