"""Who else runs, preemption, cancellation and the prefix cache change nothing that a thread says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenarios import Family, drive

from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine import events
from apr_jax.engine.engine import EngineCore
from apr_jax.engine.runner import Runner
from apr_jax.testing import byte_tokenizer, tiny_config, tiny_decoder
from apr_jax.types import SamplingParams


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


NUM_PAGES = 1000
CONFIG = EngineConfig(
    dtype="float64",
    max_threads=8,
    steps_per_dispatch=6,
    prefill_chunk=16,
    prefill_rows=2,
    max_tail_pages=4,
    item_pages=4,
    min_shared_tokens=6,
)
MODEL = tiny_config(vocab_size=40, eos_ids=(0,), max_position=2048)


@pytest.fixture(scope="module")
def runner(float64):
    """One for all engines of this file, so that programs compile once."""
    return Runner(MODEL, tiny_decoder(MODEL, 0, jnp.float64), CacheConfig(page_size=4, num_pages=NUM_PAGES), CONFIG)


def make_engine(runner: Runner, num_pages: int = NUM_PAGES, prefix_cache: bool = True) -> EngineCore:
    cache_config = CacheConfig(page_size=4, num_pages=num_pages, prefix_cache=prefix_cache)
    return EngineCore(MODEL, None, byte_tokenizer(), cache_config=cache_config, engine_config=CONFIG, runner=runner)


def assert_clean(engine: EngineCore) -> None:
    engine.cache.flush_prefix_cache()
    engine.cache.check()
    assert engine.cache.pool.num_free == engine.cache.pool.total
    assert not engine.scheduler.families


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [True, False])
def test_storm_equals_alone(runner, greedy: bool):
    num_requests = 64
    alone = make_engine(runner, prefix_cache=False)
    expected = []
    for seed in range(num_requests):
        family = Family(seed, 40, greedy)
        drive(alone, [family])
        expected.append(family.log)
    assert_clean(alone)

    storm = make_engine(runner, num_pages=131)
    preemptions = []
    storm.listeners.append(lambda e: preemptions.append(e) if isinstance(e, events.PreemptEvent) else None)
    families = [Family(seed, 40, greedy) for seed in range(num_requests)]
    rng = np.random.default_rng(0)
    victims = []

    def disturb(step: int) -> None:
        storm.cache.check()
        if step % 3 == 0:
            prompt = [7] * 24 + [int(i) for i in rng.integers(1, 40, 10)]
            victims.append(storm.submit(prompt, sampling=SamplingParams(max_new_tokens=50, temperature=1.0)))
        if victims and rng.random() < 0.4:
            storm.cancel(victims.pop(int(rng.integers(len(victims)))))

    drive(storm, families, disturb)
    for victim in victims:
        storm.cancel(victim)
    for seed, family in enumerate(families):
        assert family.log == expected[seed], f"family {seed}"
    assert sum(len(log) for log in expected) > 250, "the scenarios fork too little to show anything"
    assert sum(not e.resumed for e in preemptions) > 20, "the pool was large enough: nothing was preempted"
    assert_clean(storm)
