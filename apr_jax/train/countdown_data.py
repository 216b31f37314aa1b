"""Countdown traces for training: a pure function of the sample's index."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apr_jax.config import check
from apr_jax.tasks import (
    countdown,
    countdown_apr,
    countdown_format,
    countdown_renderings,
    countdown_search,
    countdown_sets,
    countdown_vocabulary,
    trace,
)
from apr_jax.tasks.countdown import Problem, ProblemConfig, draw_problem
from apr_jax.tasks.countdown_format import FORMATS, render_blocks
from apr_jax.tasks.countdown_renderings import RENDERINGS
from apr_jax.tasks.countdown_search import MAX_LARGE_VALUE, search
from apr_jax.tasks.countdown_sets import SETS, held_out_problems
from apr_jax.tasks.countdown_vocabulary import MAX_TARGET, PAD, vocabulary
from apr_jax.train import countdown_drills, data, packing
from apr_jax.train.countdown_drills import draw_answers, draw_nodes, draw_rounds
from apr_jax.train.packing import Row, flatten

PIECE_IDS = {piece: i for i, piece in enumerate(vocabulary())}
PAD_ID = PIECE_IDS[PAD]
_CODE = (
    countdown,
    countdown_apr,
    countdown_format,
    countdown_renderings,
    countdown_search,
    countdown_sets,
    countdown_vocabulary,
    trace,
    countdown_drills,
    data,
    packing,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountdownSamples:
    """Which traces are trained on. No problem of a held-out set is ever drawn.

    Attributes:
      seed: of the training problems and of the choices below.
      max_len: traces and drills with a longer row are left out: many of those with 5 and 6 numbers or large targets
        that search long.
      keep_easy: share kept of the problems that the opening solves (nearly half of all, and short).
      shares: how often each rendering is chosen, in the order of RENDERINGS; need not sum to 1.
      conclusion_share: of the stitched ones, those joined by conclusion; first_share: those joined where the first
        branch solves.
      off_share: of those with blocks, those that write some or all as lines, as a thread does that may not fork.
      sizes: how often a problem has 3, 4, 5 and 6 numbers; need not sum to 1.
      large_share: of problems that are not written in APR's text, those with a target above 100, up to 999.
      drill_share: of all samples, those that are drills instead (see `countdown_drills`); drill_shares: how often they
        are of rounds, nodes and answers; need not sum to 1.
    """

    seed: int = 0
    max_len: int = 2048
    keep_easy: float = 0.5
    shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    conclusion_share: float = 0.2
    first_share: float = 0.2
    off_share: float = 0.1
    sizes: tuple[float, ...] = (0.0, 1.0, 0.0, 0.0)
    large_share: float = 0.0
    drill_share: float = 0.0
    drill_shares: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        for name, count in (("shares", len(RENDERINGS)), ("sizes", 4), ("drill_shares", 3)):
            shares = getattr(self, name)
            if len(shares) != count or min(shares) < 0 or sum(shares) <= 0:
                raise ValueError(f"{name} are {shares}, must be {count} numbers >= 0, not all 0")
        for name in ("keep_easy", "conclusion_share", "first_share", "off_share", "large_share", "drill_share"):
            check(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}, must be in [0, 1]")

    def __call__(self, index: int) -> list[Row]:
        """The rows of sample number `index`; none if it is left out."""
        rng = np.random.default_rng((self.seed, index, 1))
        drill, large, keep, join_draw, off = rng.random(5)
        if drill < self.drill_share:
            kind = rng.choice(3, p=_normalised(self.drill_shares))
            if kind == 2:
                drills = draw_answers(rng, _held_out())
            else:
                drills = [draw_nodes(rng, _held_out()) if kind == 1 else draw_rounds(rng)]
            rows = [row for drill in drills for row in flatten(drill, PIECE_IDS.__getitem__, self._join(join_draw))]
            return self._short_enough(rows)
        program = list(RENDERINGS)[rng.choice(len(RENDERINGS), p=_normalised(self.shares))]
        num_numbers = 3 + int(rng.choice(4, p=_normalised(self.sizes)))
        is_large = program != "apr" and large < self.large_share
        targets = {"min_target": MAX_TARGET + 1, "max_target": MAX_LARGE_VALUE} if is_large else {}
        config = ProblemConfig(num_numbers=num_numbers, **targets)
        tree = search(draw_problem(self.seed, index, config, exclude=_held_out()), beyond=False)
        if tree.opening.solution is not None and keep >= self.keep_easy:
            return []
        if program in FORMATS and tree.blocks and off < self.off_share:
            trace = render_blocks(tree, FORMATS[program], max_forks=int(rng.integers(min(2, len(tree.blocks)))))
        else:
            trace = RENDERINGS[program](tree)
        return self._short_enough(flatten(trace, PIECE_IDS.__getitem__, self._join(join_draw)))

    def _join(self, drawn: float) -> str:
        joins = {"conclusion": self.conclusion_share, "first": self.conclusion_share + self.first_share}
        return next((name for name, bound in joins.items() if drawn < bound), "stitch")

    def _short_enough(self, rows: list[Row]) -> list[Row]:
        return rows if max(map(len, rows)) <= self.max_len else []


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Samples whose settings change on the way.

    Attributes:
      stages: (index of a stage's first sample, its settings), ascending from 0.
    """

    stages: tuple[tuple[int, CountdownSamples], ...]

    def __post_init__(self):
        firsts = [first for first, _ in self.stages]
        if firsts[:1] != [0] or any(later <= earlier for earlier, later in itertools.pairwise(firsts)):
            raise ValueError(f"stages begin at samples {firsts}, must ascend from 0")

    @classmethod
    def of(cls, settings: Mapping[str, Any], changes: Sequence[tuple[int, Mapping[str, Any]]] = ()) -> "Curriculum":
        """From the fields of `CountdownSamples`, and the fields that change from a sample on.

        Raises:
          ValueError: there is no such field, or one is out of its range.
        """
        known = {field.name for field in dataclasses.fields(CountdownSamples)}
        check(all(len(change) == 2 for change in changes), f"stages are {changes}, must be pairs: sample and changes")
        given = [*settings, *(name for _, changed in changes for name in changed)]
        unknown = [name for name in given if name not in known]
        check(not unknown, f"samples have no {', '.join(unknown)}, they have {', '.join(sorted(known))}")
        stages = [(0, CountdownSamples(**settings))]
        for first, changed in changes:
            stages.append((first, dataclasses.replace(stages[-1][1], **changed)))
        return cls(tuple(stages))

    def __call__(self, index: int) -> list[Row]:
        """The rows of sample number `index`; none if it is left out."""
        stage = bisect.bisect_right(self.stages, index, key=lambda stage: stage[0])
        return self.stages[stage - 1][1](index)


def code_version() -> str:
    """A short name for the code that makes samples, as it is now: another version may give other samples."""
    names = [*(module.__name__ for module in _CODE), __name__]
    files = [Path(str(sys.modules[name].__file__)) for name in names]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _normalised(shares: tuple[float, ...]) -> np.ndarray:
    return np.asarray(shares) / sum(shares)


@functools.cache
def _held_out() -> frozenset[Problem]:
    return frozenset(problem for name in SETS for problem in held_out_problems(name))
