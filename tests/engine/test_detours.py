"""Threads sent back to go on otherwise say what a fresh thread says that may not begin so; threads can be stopped."""

import jax
import jax.numpy as jnp
import pytest
from scripted_threads import assert_clean, make_engine, up_to

from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine import events
from apr_jax.engine.engine import EngineCore
from apr_jax.engine.runner import Runner
from apr_jax.engine.thread import Status
from apr_jax.testing import byte_tokenizer, tiny_config, tiny_decoder
from apr_jax.types import SamplingParams

MODEL = tiny_config(num_layers=1, eos_ids=())
CACHE = CacheConfig(page_size=4, num_pages=200)
PROMPT = [40, 41, 42, 43, 44, 45, 46]


def engine_config(max_tail_pages: int) -> EngineConfig:
    return EngineConfig(
        dtype="float64", steps_per_dispatch=4, max_threads=2, prefill_chunk=16, max_tail_pages=max_tail_pages
    )


@pytest.fixture(scope="module")
def runners():
    """Of one model, by the longest tail: each compiles once."""
    with jax.enable_x64(True):
        decoder = tiny_decoder(MODEL, 5, jnp.float64)
        yield {pages: Runner(MODEL, decoder, CACHE, engine_config(pages)) for pages in (1, 4)}


def engine_of(runners, max_tail_pages=4) -> EngineCore:
    config = engine_config(max_tail_pages)
    return EngineCore(
        MODEL, None, byte_tokenizer(), cache_config=CACHE, engine_config=config, runner=runners[max_tail_pages]
    )


def said(engine: EngineCore, ids: list[int], count: int, banned=()) -> list[int]:
    """What a fresh thread says."""
    root = engine.submit(ids, sampling=SamplingParams(max_new_tokens=count, banned_ids=tuple(banned)))
    engine.run()
    engine.release(root)
    engine.cache.flush_prefix_cache()
    return root.token_ids


@pytest.mark.parametrize("max_tail_pages", [1, 4])
@pytest.mark.parametrize("prompt_len", [1, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_what_is_avoided_is_not_said_in_that_place_alone(max_tail_pages, prompt_len, count, runners):
    """Twice in the same place; also where that is the first one behind the prompt, or behind a sealed segment."""
    engine, oracle = engine_of(runners, max_tail_pages), engine_of(runners)
    prompt = PROMPT[:prompt_len]
    root = engine.submit(prompt, sampling=SamplingParams(max_new_tokens=9))
    engine.run()
    told = []
    engine.listeners.append(told.append)
    kept, banned = root.token_ids[:-count], [root.token_ids[-count]]
    for turn in (1, 2):
        engine.avoid(root, len(root.token_ids) - len(kept), sampling=SamplingParams(max_new_tokens=6))
        engine.run()
        next_one = said(oracle, prompt + kept, 1, banned)
        assert root.token_ids == kept + next_one + said(oracle, prompt + kept + next_one, 5)
        assert root.num_avoided == turn and root.num_sampled == len(root.token_ids)
        banned += next_one
        engine.cache.check()
    assert sum(e.num_tokens for e in told if isinstance(e, events.RewindEvent)) == count + 6
    assert root.family.counters.overshoot_tokens == count + 6
    engine.release(root)
    assert_clean(engine)


def test_a_mark_and_what_a_fork_carried_stay_where_they_were(runners):
    """Where all that a child has said is taken back, what it began with gets its keys again, in the same segments."""
    engine, oracle = engine_of(runners), engine_of(runners)
    root = engine.submit(PROMPT, sampling=SamplingParams(max_new_tokens=2))
    engine.run()
    head = PROMPT + root.token_ids
    first, second = engine.fork(root, [[], [50]], sampling=SamplingParams(max_new_tokens=3))
    engine.run()
    engine.append(second, [51], sampling=SamplingParams(max_new_tokens=0))
    engine.run()
    engine.mark(second)
    engine.append(second, [], sampling=SamplingParams(max_new_tokens=2))
    engine.run()
    marked_at = len(second.token_ids) - 2
    before = second.token_ids[:marked_at]
    avoided = [first.token_ids[0], second.token_ids[marked_at]]
    engine.avoid(first, 3, sampling=SamplingParams(max_new_tokens=1))
    engine.avoid(second, 2, sampling=SamplingParams(max_new_tokens=1))
    engine.run()
    assert first.token_ids == said(oracle, head, 1, avoided[:1])
    assert second.token_ids == before + said(oracle, head + before, 1, avoided[1:])
    engine.join(root, [first, second], mode="conclusion", tokens=[60], sampling=SamplingParams(max_new_tokens=1))
    engine.run()
    held = [token for segment in root.context.segments for token in segment.token_ids]
    assert held == [*head, *first.token_ids, second.token_ids[-1], 60]
    engine.release(root)
    assert_clean(engine)


def test_what_cannot_be_avoided_is_refused_and_changes_nothing():
    engine = make_engine(max_stop_ids=2)
    root = engine.submit([1, 2, 3], sampling=up_to(4))
    engine.run()
    with pytest.raises(ValueError, match="0 tokens to avoid, must be >= 1 and all sampled"):
        engine.avoid(root, 0)
    with pytest.raises(ValueError, match="5 tokens to drop, the thread has 4 behind its last join"):
        engine.avoid(root, 5)
    before = list(root.token_ids)
    with pytest.raises(ValueError, match=r"2 banned and 1 avoided ids, max_stop_ids .* is 2"):
        engine.avoid(root, 1, sampling=SamplingParams(banned_ids=(1, 2)))
    assert root.token_ids == before and root.status is Status.STOPPED
    engine.append(root, [9], sampling=up_to(1))
    engine.run()
    with pytest.raises(ValueError, match="2 tokens to avoid, must be >= 1 and all sampled"):
        engine.avoid(root, 2)
    engine.release(root)
    assert_clean(engine)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_thread_can_be_stopped_wherever_it_is(steps):
    engine = make_engine(steps_per_dispatch=2)
    told = []
    engine.listeners.append(told.append)
    root = engine.submit([1, 2, 3], sampling=up_to(40))
    for _ in range(steps):
        engine.step()
    said_before = list(root.token_ids)
    engine.interrupt(root, "wall_clock")
    assert root.status is Status.STOPPED and root.stop.reason == "wall_clock"
    assert [e.reason for e in told if isinstance(e, events.StopEvent)] == ["wall_clock"]
    assert engine.step() == [] and root.token_ids == said_before
    with pytest.raises(ValueError, match="is stopped, must be waiting or running"):
        engine.interrupt(root, "wall_clock")
    engine.append(root, sampling=up_to(3))
    engine.run()
    assert len(root.token_ids) == len(said_before) + 3
    engine.release(root)
    assert_clean(engine)


def test_a_family_may_have_a_bound_of_its_own():
    engine = make_engine()
    size = engine.cache.page_size
    with pytest.raises(ValueError, match="the prompt needs 3 pages, a family may hold 2"):
        engine.submit([1] * (2 * size), sampling=up_to(2), max_pages=2)
    small = engine.submit([1, 2, 3], sampling=up_to(9 * size), max_pages=4)
    large = engine.submit([4, 5, 6], sampling=up_to(9 * size))
    engine.run()
    assert small.stop.reason == "pages" and engine.scheduler.family_pages(small.family) == 4
    assert large.stop.reason == "length"
    for root in (small, large):
        engine.release(root)
    assert_clean(engine)
