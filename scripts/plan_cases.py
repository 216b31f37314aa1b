"""Plans of `benchmark.py`: what the host does before a dispatch, for families of threads with nested forks."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from apr_jax.cache.cache import KVCache
from apr_jax.cache.context import Context
from apr_jax.cache.plan_builder import PlanBuilder
from apr_jax.config import CacheConfig, EngineConfig, check

PROMPT_TOKENS = (500, 1000)
THREAD_TOKENS = (5, 100)
STEP_TOKENS = 8
NUM_RUNS = 60
NUM_GROWN_RUNS = 12  # tails have room for so many times STEP_TOKENS


def run_plan(num_threads: int, num_families: int) -> dict[str, Any]:
    """One case: in each family a prompt forks in about as many threads as each of those forks in.

    Times are of the building thread's CPU, in ms: a plan made anew (of segments that were in plans before), one after
    all rows grew by a few tokens, and one after nothing changed.
    """
    check(num_threads >= num_families, f"{num_threads} threads in {num_families} families, must be at least one each")
    cache_config = CacheConfig(num_pages=num_threads * 20 + num_families * 80, prefix_cache=False)
    config = EngineConfig(max_threads=num_threads)
    cache = KVCache(cache_config, config.max_tail_pages)
    threads = list(enumerate(_threads(cache, num_threads, num_families)))
    last = PlanBuilder(cache_config, config)

    def build(builder: PlanBuilder) -> float:
        started = time.thread_time()
        builder.build(threads, num_threads, num_threads)
        return 1e3 * (time.thread_time() - started)

    def grown() -> float:
        for _, context in threads:
            cache.reserve(context, STEP_TOKENS)
            cache.advance(context, [1] * STEP_TOKENS)
        return build(last)

    cases: dict[str, Callable[[], float]] = {
        "anew": lambda: build(PlanBuilder(cache_config, config)),
        "grown": grown,
        "same": lambda: build(last),
    }
    build(last)
    result: dict[str, Any] = {"name": f"plan_threads{num_threads}_families{num_families}"}
    for name, run in cases.items():
        times = [run() for _ in range(NUM_GROWN_RUNS if name == "grown" else NUM_RUNS)]
        result |= {f"{name}_best_ms": min(times), f"{name}_median_ms": statistics.median(times)}
    return result


def _threads(cache: KVCache, num_threads: int, num_families: int) -> list[Context]:
    """Contexts in the order of their forks; prompts are sealed in pieces, as a prefill seals them."""
    rng = np.random.default_rng(0)
    threads: list[Context] = []
    for family in range(num_families):
        size = num_threads * (family + 1) // num_families - num_threads * family // num_families
        width = max(1, round(size**0.5))
        root = cache.match_prefix([])[0]
        left = int(rng.integers(*PROMPT_TOKENS))
        while left > 0:
            _grow(cache, root, min(400, left))
            cache.seal(root)
            left -= 400
        for i, child in enumerate(cache.fork(root, width)):
            _grow(cache, child, int(rng.integers(*THREAD_TOKENS)))
            grandchildren = cache.fork(child, size * (i + 1) // width - size * i // width)
            for grandchild in grandchildren:
                _grow(cache, grandchild, int(rng.integers(*THREAD_TOKENS)))
            threads += grandchildren
    return threads


def _grow(cache: KVCache, context: Context, num_tokens: int) -> None:
    cache.reserve(context, num_tokens)
    cache.advance(context, [1] * num_tokens)


def plan_table(results: list[dict[str, Any]]) -> Table:
    """What `run_plan` returned, a row a case."""
    table = Table(title="host time of a plan, ms of CPU: best, median")
    for column in ("case", "made anew", f"{STEP_TOKENS} tokens more a row", "nothing new"):
        table.add_column(column, justify="left" if column == "case" else "right", overflow="fold")
    for result in results:
        cells = (f"{result[f'{k}_best_ms']:.2f}, {result[f'{k}_median_ms']:.2f}" for k in ("anew", "grown", "same"))
        table.add_row(result["name"], *cells)
    return table
