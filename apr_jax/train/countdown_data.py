"""Countdown traces for training: a pure function of the sample's index."""

import dataclasses
import functools

import numpy as np

from apr_jax.tasks.countdown import Problem, draw_problem, draw_problems
from apr_jax.tasks.countdown_format import PAD, RENDERINGS, vocabulary
from apr_jax.tasks.countdown_search import search
from apr_jax.train.countdown_drills import draw_drill
from apr_jax.train.packing import Row, flatten

PIECE_IDS = {piece: i for i, piece in enumerate(vocabulary())}
PAD_ID = PIECE_IDS[PAD]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountdownSamples:
    """Which traces are trained on.

    Attributes:
      seed: of the training problems and of the choices below.
      held_out_seed, num_held_out: the problems that are never trained on, `draw_problems(seed, num)`.
      max_len: longer traces are left out.
      keep_easy: share kept of the problems that the opening solves (about half of all, and short).
      parallel_share: traces written as Multiverse blocks; the others are sequential.
      drill_share: of the first `num_drilled` samples, those that are drills instead (see `countdown_drills`).
      conclusion_share: of the parallel ones, those joined by conclusion.
    """

    seed: int = 0
    held_out_seed: int = 1
    num_held_out: int = 500
    max_len: int = 1152
    keep_easy: float = 0.5
    parallel_share: float = 0.5
    conclusion_share: float = 0.25
    drill_share: float = 0.0
    num_drilled: int = 0

    def held_out(self) -> list[Problem]:
        """The held-out problems."""
        return draw_problems(self.held_out_seed, self.num_held_out)

    def __call__(self, index: int) -> Row | None:
        """Sample number `index`; None if it is left out."""
        rng = np.random.default_rng((self.seed, index, 1))
        if index < self.num_drilled and rng.random() < self.drill_share:
            return flatten(draw_drill(rng), PIECE_IDS.__getitem__)
        tree = search(draw_problem(self.seed, index, exclude=_held_out(self)))
        keep, parallel, conclusion = rng.random(3)
        if tree.opening.solution is not None and keep >= self.keep_easy:
            return None
        program = "multiverse" if parallel < self.parallel_share else "sequential"
        join = "conclusion" if conclusion < self.conclusion_share else "stitch"
        row = flatten(RENDERINGS[program](tree), PIECE_IDS.__getitem__, join)
        return row if len(row) <= self.max_len else None


@functools.cache
def _held_out(samples: CountdownSamples) -> frozenset[Problem]:
    return frozenset(samples.held_out())
