"""Bootstrap intervals against every possible resample, and against the normal approximation."""

import itertools

import numpy as np
import pytest

from apr_jax.evaluation.statistics import bootstrap


def test_against_all_resamples_of_four_values():
    values = np.array([0.0, 1.0, 4.0, 11.0])
    means = np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=4)])  # 256, equally likely
    found = bootstrap(values, num_resamples=40_000)
    assert found.mean == values.mean()
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        below, upto = np.mean(means < end), np.mean(means <= end)
        assert below - 0.006 <= share <= upto + 0.006


def test_many_coins_have_the_normal_interval():
    values = np.repeat([0.0, 1.0], [200, 300])
    found = bootstrap(values)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 500)
    assert found.low == pytest.approx(0.6 - half, abs=0.004)
    assert found.high == pytest.approx(0.6 + half, abs=0.004)


def test_the_same_seed_gives_the_same_interval_and_one_value_has_no_width():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    assert bootstrap(np.array([3.0])) == type(bootstrap(values))(3.0, 3.0, 3.0)


def test_blocks_do_not_change_the_draws(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap(values)
    monkeypatch.setattr("apr_jax.evaluation.statistics._BLOCK", 50)
    assert bootstrap(values) == whole


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_nothing_to_draw_from_is_refused(values):
    with pytest.raises(ValueError, match="a bootstrap of"):
        bootstrap(np.array(values))
