"""Random sequences of operations against the brute-force model."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cache.simulation import Simulation

OPERATION = st.tuples(st.integers(0, 22), st.integers(0, 15), st.integers(0, 1023))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    num_pages=st.integers(4, 60),
    page_size=st.sampled_from([1, 2, 4]),
    prefix_cache=st.booleans(),
    operations=st.lists(OPERATION, min_size=10, max_size=60),
)
def test_any_sequence(num_pages, page_size, prefix_cache, operations):
    Simulation(num_pages, page_size, prefix_cache).run(operations)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_pages", "page_size"), [(20, 1), (60, 1), (200, 1), (40, 2), (9, 4), (60, 4)])
def test_long_sequences(seed, num_pages, page_size):
    rng = random.Random(seed)
    operations = [(rng.randrange(23), rng.randrange(16), rng.randrange(1024)) for _ in range(500)]
    Simulation(num_pages, page_size).run(operations)
