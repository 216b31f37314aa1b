"""The benchmark's plans: as many threads as asked for, in families whose threads share their prompt."""

import pytest
from apr_kernels.plan import validate_plan
from plan_cases import _threads, plan_table, run_plan

from apr_jax.cache.cache import KVCache
from apr_jax.cache.plan_builder import PlanBuilder
from apr_jax.config import CacheConfig, EngineConfig


@pytest.mark.parametrize(("num_threads", "num_families"), [(1, 1), (7, 2), (16, 3)])
def test_families_share_their_prompt(num_threads, num_families):
    config = CacheConfig(num_pages=800, prefix_cache=False)
    cache = KVCache(config, EngineConfig.max_tail_pages)
    threads = _threads(cache, num_threads, num_families)
    assert len(threads) == num_threads
    assert len({context.segments[0].id for context in threads}) == num_families
    plan = PlanBuilder(config, EngineConfig(max_threads=16)).build(list(enumerate(threads)), 16, 16)
    validate_plan(plan, num_pages=config.num_pages, page_size=config.page_size)


def test_times_and_what_is_refused():
    found = run_plan(6, 2)
    assert found["name"] == "plan_threads6_families2"
    assert 0 < found["same_best_ms"] <= found["same_median_ms"] and found["anew_best_ms"] > 0
    assert plan_table([found]).row_count == 1
    with pytest.raises(ValueError, match="4 threads in 16 families"):
        run_plan(4, 16)
