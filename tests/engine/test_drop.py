"""Forks that take back the thread's last tokens: what it and its children hold then, also across sealed segments."""

import pytest

from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine import events
from apr_jax.engine.engine import EngineCore
from apr_jax.testing import byte_tokenizer, tiny_config
from apr_jax.testing.scripted import ScriptedRunner
from apr_jax.types import OutOfPages, SamplingParams

PROMPT = [7] * 5


def engine_that_counts(max_tail_pages=32, **fields) -> EngineCore:
    """An engine whose threads say 1, 2, 3, ..."""
    config = EngineConfig(max_tail_pages=max_tail_pages, steps_per_dispatch=4, **fields)
    runner = ScriptedRunner(lambda thread, ids: 1 + len(ids), config.steps_per_dispatch)
    cache = CacheConfig(page_size=4, num_pages=64)
    return EngineCore(tiny_config(), None, byte_tokenizer(), cache_config=cache, engine_config=config, runner=runner)


def submit(engine: EngineCore, count: int):
    root = engine.submit(PROMPT, sampling=SamplingParams(max_new_tokens=count))
    engine.run()
    return root


def held(thread) -> list[int]:
    return [token for segment in thread.context.segments for token in segment.token_ids] + thread.pending


@pytest.mark.parametrize("max_tail_pages", [1, 2, 32])
@pytest.mark.parametrize("drop", [0, 1, 2, 9, 22])
def test_dropped_tokens_belong_to_nobody(drop, max_tail_pages):
    engine = engine_that_counts(max_tail_pages)
    seen = []
    engine.listeners.append(seen.append)
    root = submit(engine, 22)
    said = list(range(1, 23))
    (child,) = engine.fork(root, [[50, 51]], sampling=SamplingParams(max_new_tokens=3), drop=drop)
    engine.cache.check()
    kept = said[: 22 - drop]
    assert root.token_ids == kept and len(root.sampled) == len(root.logprobs) == len(kept)
    assert held(root) == PROMPT + kept and not root.pending
    assert held(child) == PROMPT + kept + [50, 51]
    assert child.start_position == len(PROMPT) + 22 - drop
    assert [event.num_tokens for event in seen if isinstance(event, events.RewindEvent)] == ([drop] if drop else [])
    counters = root.family.counters
    assert counters.overshoot_tokens == drop
    assert counters.reprefill_tokens < 4 * max_tail_pages and (counters.reprefill_tokens == 0 or drop > 1)
    engine.run()
    engine.join(root, [child], mode="splice", tokens=[60], sampling=SamplingParams(max_new_tokens=2))
    engine.run()
    assert held(root) == PROMPT + root.token_ids and root.token_ids[: len(kept) + 1] == [*kept, 60]
    engine.cache.check()
    engine.release(root)
    engine.cache.flush_prefix_cache()
    assert engine.cache.pool.num_free == engine.cache.pool.total


def test_what_cannot_be_dropped_is_refused():
    engine = engine_that_counts()
    root = submit(engine, 6)
    params = SamplingParams(max_new_tokens=1)
    for drop in (-1, 7):
        with pytest.raises(ValueError, match=f"{drop} tokens to drop, the thread has 6 behind its last join"):
            engine.fork(root, [[1]], sampling=params, drop=drop)
    with pytest.raises(ValueError, match="children of a fork that drops tokens need forced ones"):
        engine.fork(root, [[1], []], sampling=params, drop=2)
    (child,) = engine.fork(root, [[1]], sampling=params, drop=2)
    engine.run()
    engine.join(root, [child], tokens=[60], sampling=params)
    engine.run()
    with pytest.raises(ValueError, match="3 tokens to drop, the thread has 2 behind its last join"):
        engine.fork(root, [[1]], sampling=params, drop=3)


def test_a_refused_fork_drops_nothing():
    engine = engine_that_counts(max_family_pages=4)
    root = submit(engine, 6)
    with pytest.raises(OutOfPages):
        engine.fork(root, [[1], [2]], sampling=SamplingParams(max_new_tokens=1), drop=2)
    assert root.token_ids == [1, 2, 3, 4, 5, 6] and held(root) == PROMPT + root.token_ids
    assert root.family.counters.overshoot_tokens == 0


def test_a_fork_that_finds_no_pages_gives_the_tokens_back(monkeypatch):
    engine = engine_that_counts(max_tail_pages=1)
    root = submit(engine, 6)
    root.logprobs[:] = [-0.5] * 6

    def no_pages(threads):
        raise OutOfPages(1, 0, "the pool")

    with monkeypatch.context() as patched, pytest.raises(OutOfPages):
        patched.setattr(engine, "_flush", no_pages)
        engine.fork(root, [[1], [2]], sampling=SamplingParams(max_new_tokens=1), drop=3)
    assert root.token_ids == [1, 2, 3, 4, 5, 6] and held(root) == PROMPT + root.token_ids
    assert root.sampled == [True] * 6 and root.logprobs == [-0.5] * 6
    engine.fork(root, [[1], [2]], sampling=SamplingParams(max_new_tokens=1), drop=3)
    assert root.token_ids == [1, 2, 3]


@pytest.mark.parametrize("max_tail_pages", [1, 32])
@pytest.mark.parametrize("drop", [1, 7])
def test_forced_tokens_may_replace_the_last_ones(drop, max_tail_pages):
    engine = engine_that_counts(max_tail_pages)
    root = submit(engine, 12)
    engine.append(root, [60, 61], sampling=SamplingParams(max_new_tokens=2), drop=drop)
    engine.run()
    kept = 12 - drop
    assert root.token_ids == [*range(1, kept + 1), 60, 61, kept + 3, kept + 4]
    assert root.sampled == [True] * kept + [False] * 2 + [True] * 2
    assert held(root) == PROMPT + root.token_ids
    with pytest.raises(ValueError, match="tokens are dropped only where others are forced instead"):
        engine.append(root, drop=1)
    with pytest.raises(ValueError, match="99 tokens to drop"):
        engine.append(root, [1], drop=99)


def test_tokens_in_host_memory_are_dropped_too():
    """A whole tail, and what lies sealed before it."""
    engine = engine_that_counts(max_tail_pages=2)
    root = submit(engine, 22)
    engine.scheduler._step_back(root.family)
    assert all(segment.swapped for segment in root.context.segments)
    (child,) = engine.fork(root, [[50]], sampling=SamplingParams(max_new_tokens=3), drop=20)
    engine.cache.check()
    assert held(root) == [*PROMPT, 1, 2] and held(child) == [*PROMPT, 1, 2, 50]
    engine.release(root)
    engine.cache.flush_prefix_cache()
    assert engine.cache.pool.num_free == engine.cache.pool.total
