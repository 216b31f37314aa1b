"""Bootstrap intervals over problems: what the mean could have been, had other problems been drawn."""

import dataclasses

import numpy as np

from apr_jax.config import check

NUM_RESAMPLES = 4000
_BLOCK = 1 << 22  # indices drawn at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean, and the percentile bootstrap's 95% interval around it."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, seed: int = 0, num_resamples: int = NUM_RESAMPLES, level: float = 0.95) -> Interval:
    """The mean of one value a problem, with its percentile bootstrap interval.

    Args:
      values: f64[N], one a problem. For a paired comparison, the differences.
      seed: of the resampling; the same one draws the same problems for every program.

    Raises:
      ValueError: there is no value, or one is not finite.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    values = np.asarray(values, np.float64)
    check(values.size > 0, "a bootstrap of 0 values, at least 1 is needed")
    check(bool(np.isfinite(values).all()), "a bootstrap of values that are not all finite")
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    block = max(1, _BLOCK // values.size)
    for start in range(0, num_resamples, block):
        stop = min(start + block, num_resamples)
        means[start:stop] = values[rng.integers(values.size, size=(stop - start, values.size))].mean(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))
