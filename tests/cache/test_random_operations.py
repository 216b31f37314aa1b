"""Random sequences of operations against the brute-force model."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cache.simulation import Simulation

OPERATION = st.tuples(st.integers(0, 19), st.integers(0, 15), st.integers(0, 1023))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    num_pages=st.integers(4, 60),
    prefix_cache=st.booleans(),
    operations=st.lists(OPERATION, min_size=10, max_size=60),
)
def test_any_sequence(num_pages, prefix_cache, operations):
    Simulation(num_pages, prefix_cache).run(operations)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_pages", [9, 30, 90])
def test_long_sequences(seed, num_pages):
    rng = random.Random(seed)
    operations = [(rng.randrange(20), rng.randrange(16), rng.randrange(1024)) for _ in range(500)]
    Simulation(num_pages).run(operations)
