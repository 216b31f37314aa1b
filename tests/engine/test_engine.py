"""Requests, stops, forks and joins through a tiny model; what each primitive promises and refuses."""

import dataclasses
import logging
import math

import jax
import pytest

from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine import events
from apr_jax.engine.engine import EngineCore
from apr_jax.engine.runner import Runner
from apr_jax.engine.stop_strings import find_stop
from apr_jax.engine.thread import Status
from apr_jax.testing import byte_tokenizer, tiny_config, tiny_decoder
from apr_jax.types import OutOfPages, SamplingParams

MODEL = tiny_config(max_position=128)
CACHE = CacheConfig(page_size=4, num_pages=100)
CONFIG = EngineConfig(max_threads=8, steps_per_dispatch=4, prefill_chunk=16, prefill_rows=2, max_tail_pages=8)
FREE_RUN = SamplingParams(max_new_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def runner():
    return Runner(MODEL, tiny_decoder(MODEL), CACHE, CONFIG)


@pytest.fixture
def engine(runner):
    engine = EngineCore(MODEL, None, byte_tokenizer(), cache_config=CACHE, engine_config=CONFIG, runner=runner)
    yield engine
    for family in list(engine.scheduler.families.values()):
        engine.cancel(family.root)
    engine.cache.flush_prefix_cache()
    engine.cache.check()
    assert engine.cache.pool.num_free == engine.cache.pool.total


def finished(engine: EngineCore, prompt, sampling: SamplingParams):
    thread = engine.submit(prompt, sampling=sampling)
    engine.run()
    return thread


def test_stops(engine):
    free = finished(engine, [1, 2, 3], FREE_RUN)
    assert free.stop.reason == "length" and len(free.token_ids) == 10 and all(free.sampled)
    third = free.token_ids[2]
    first_at = free.token_ids.index(third)
    stopped = finished(engine, [1, 2, 3], dataclasses.replace(FREE_RUN, stop_ids=(third,)))
    assert stopped.stop.reason == "stop_id" and stopped.stop.token_id == third
    assert stopped.token_ids == free.token_ids[: first_at + 1]
    assert not stopped.pending and stopped.family.counters.flush_tokens == 1, "the stop was fed on the device"
    eos = finished(engine, [1, 2, 3], SamplingParams(max_new_tokens=100))
    assert eos.stop.reason in ("eos", "length")
    nothing = finished(engine, [1, 2, 3], SamplingParams(max_new_tokens=0))
    assert nothing.stop.reason == "prefilled" and nothing.token_ids == []
    window = finished(engine, [1] * 120, dataclasses.replace(FREE_RUN, max_new_tokens=50))
    assert window.stop.reason == "context" and len(window.token_ids) == 128 - 120 + 1


def test_stop_strings_roll_back(engine):
    free = finished(engine, [5, 6], dataclasses.replace(FREE_RUN, max_new_tokens=12))
    text = engine.tokenizer.decode(free.token_ids[4:6])
    stopped = finished(engine, [5, 6], dataclasses.replace(FREE_RUN, max_new_tokens=12, stop=(text,)))
    assert stopped.stop.reason == "stop_string" and stopped.stop.string == text
    assert text in engine.tokenizer.decode(stopped.token_ids)
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) <= 6
    # Going on from the rolled back place says what was said before.
    rest = 12 - len(stopped.token_ids)
    engine.append(stopped, sampling=dataclasses.replace(FREE_RUN, max_new_tokens=rest))
    engine.run()
    assert stopped.token_ids == free.token_ids


@pytest.mark.parametrize("stop", ["é", "5€", "👍", "né 。", "。👍", "voilà"])
def test_stop_strings_of_several_bytes_a_character(stop):
    """By tokens of a byte each a character is not there before its last one."""
    ids = byte_tokenizer().encode("Réponse: né 。👍 5€ voilà. Fin")
    text = byte_tokenizer().decode(ids)
    wanted = len(byte_tokenizer().encode(text[: text.index(stop) + len(stop)]))
    for step in (1, 3, 16):
        found = None
        for first in range(0, len(ids), step):
            found = found or find_stop(byte_tokenizer().decode, ids[: first + step], first, (stop,))
        assert found == (wanted, stop)


def test_logprobs_are_the_models(engine):
    thread = finished(
        engine, [9, 8, 7], SamplingParams(max_new_tokens=5, ignore_eos=True, logprobs=True, temperature=1.0)
    )
    assert all(-20 < x < 0 for x in thread.logprobs)
    engine.append(thread, [1, 2], sampling=dataclasses.replace(FREE_RUN, max_new_tokens=1))
    assert all(math.isnan(x) for x in thread.logprobs[5:7])


def test_refusals(engine):
    with pytest.raises(ValueError, match="prompt is empty"):
        engine.submit([])
    with pytest.raises(ValueError, match="129 tokens, the context window is 128"):
        engine.submit([1] * 129)
    with pytest.raises(ValueError, match=f"token id {MODEL.vocab_size} is outside"):
        engine.submit([MODEL.vocab_size])
    with pytest.raises(ValueError, match="9 stop ids"):
        engine.submit([1], sampling=SamplingParams(stop_ids=tuple(range(9)), ignore_eos=True))
    thread = engine.submit([1, 2], sampling=FREE_RUN)
    with pytest.raises(ValueError, match="waiting, must be stopped"):
        engine.fork(thread, [[1]], sampling=FREE_RUN)
    with pytest.raises(ValueError, match="cancel it"):
        engine.release(thread)
    engine.run()
    with pytest.raises(ValueError, match="0 children"):
        engine.fork(thread, [], sampling=[])
    children = engine.fork(thread, [[1], [2]], sampling=FREE_RUN)
    with pytest.raises(ValueError, match="must be stopped"):
        engine.join(thread, children, tokens=[1])
    engine.run()
    with pytest.raises(ValueError, match="needs tokens"):
        engine.join(thread, children)
    with pytest.raises(ValueError, match="select joins 1 child, not 2"):
        engine.join(thread, children, mode="select")
    with pytest.raises(ValueError, match="'glue' is not one of"):
        engine.join(thread, children, mode="glue")  # type: ignore[arg-type]


def test_a_family_bound_refuses_and_degrades(runner):
    config = dataclasses.replace(CONFIG, max_family_pages=6)
    engine = EngineCore(MODEL, None, byte_tokenizer(), cache_config=CACHE, engine_config=config, runner=runner)
    with pytest.raises(ValueError, match="needs 8 pages, a family may hold 6"):
        engine.submit([1] * 30)
    thread = finished(engine, [1] * 12, dataclasses.replace(FREE_RUN, max_new_tokens=60))
    assert thread.stop.reason == "pages" and 6 * 4 - 12 <= len(thread.token_ids) <= 6 * 4 - 11
    with pytest.raises(OutOfPages):
        engine.fork(thread, [[1], [2]], sampling=FREE_RUN)
    assert thread.status is Status.STOPPED
    engine.release(thread)
    engine.cache.check()


def test_fork_runs_in_waves_and_a_join_prefills_nothing(engine):
    root = finished(engine, [3] * 10, FREE_RUN)
    children = engine.fork(root, [[i + 1] for i in range(20)], sampling=FREE_RUN)  # 8 rows
    engine.run()
    assert all(child.status is Status.STOPPED and len(child.token_ids) == 11 for child in children)
    fed_before = engine.stats.prefill_tokens
    engine.join(root, children[:3], tokens=[4], sampling=FREE_RUN)
    assert engine.stats.prefill_tokens - fed_before == 3, "only the children's last tokens are fed"
    assert root.family.counters.reprefill_tokens == 0
    assert root.context.next_position == 19 + 1 + 11, "the longest child decides"
    assert [child.status for child in children] == [Status.FINISHED] * 3 + [Status.CANCELLED] * 17
    engine.run()
    assert root.stop.reason == "length"


def test_an_empty_fork_counts_the_last_token_once(engine):
    root = finished(engine, [3] * 5, FREE_RUN)
    children = engine.fork(root, [[], []], sampling=dataclasses.replace(FREE_RUN, temperature=1.0))
    engine.run()
    alone = finished(engine, [3] * 5, FREE_RUN)
    engine.join(root, children, tokens=[4], sampling=FREE_RUN)
    engine.run()
    held = [token for segment in root.context.segments for token in segment.token_ids] + root.pending
    said = alone.token_ids + children[0].token_ids + children[1].token_ids + root.token_ids[10:]
    assert held == [3] * 5 + said


def test_cancel_at_any_moment(engine):
    shared = [6] * 20
    keeper = engine.submit([*shared, 1], sampling=FREE_RUN)
    threads = [engine.submit([*shared, i], sampling=FREE_RUN) for i in range(12)]
    for thread in threads[:4]:
        engine.cancel(thread)  # before it ran
    engine.listeners.append(lambda e: engine.cancel(threads[5]) if isinstance(e, events.TokenEvent) else None)
    while not all(t.is_done or t.status is Status.STOPPED for t in threads):
        engine.step()
        engine.cache.check()
        running = [t for t in threads if t.status is Status.RUNNING]
        if running:
            engine.cancel(running[0])
    engine.listeners.clear()
    engine.run()
    assert threads[5].status is Status.CANCELLED
    assert keeper.token_ids == finished(engine, [*shared, 1], FREE_RUN).token_ids


def test_events_tell_the_whole_story(engine):
    seen = []
    engine.listeners.append(seen.append)
    root = finished(engine, [3] * 10, FREE_RUN)
    children = engine.fork(root, [[1], [2]], sampling=FREE_RUN)
    engine.run()
    engine.join(root, children, tokens=[4], sampling=FREE_RUN)
    engine.run()
    engine.release(root)
    by_thread = {}
    for event in seen:
        if isinstance(event, events.TokenEvent):
            by_thread.setdefault(event.thread_id, []).extend(event.token_ids)
    assert by_thread == {t.id: t.token_ids for t in (root, *children)}
    uneventful = (events.TokenEvent, events.KeysEvent, events.StepEvent)
    kinds = [type(e).__name__ for e in seen if not isinstance(e, uneventful)]
    assert kinds == [
        "SubmitEvent", "StopEvent", "ForkEvent", "StopEvent", "StopEvent", "FinishEvent", "FinishEvent",
        "JoinEvent", "StopEvent", "FinishEvent",
    ]  # fmt: skip


def test_one_round_trip_a_dispatch(engine):
    root = finished(engine, [3] * 10, SamplingParams(max_new_tokens=0))
    before = dataclasses.replace(engine.stats)
    engine.append(root, sampling=dataclasses.replace(FREE_RUN, max_new_tokens=4))
    engine.run()
    assert engine.stats.num_round_trips - before.num_round_trips == 1
    assert engine.stats.decode_tokens - before.decode_tokens == 4


@pytest.mark.slow
def test_after_warm_up_nothing_compiles(caplog):
    config = dataclasses.replace(CONFIG, max_threads=2, prefill_rows=1)
    model = dataclasses.replace(MODEL, num_layers=1)  # there are many programs
    engine = EngineCore(model, tiny_decoder(model), byte_tokenizer(), cache_config=CACHE, engine_config=config)
    num_programs = engine.warm_up()
    assert num_programs <= 24
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING, logger="jax"):
            root = finished(engine, list(range(1, 60)), dataclasses.replace(FREE_RUN, temperature=0.7, top_p=0.9))
            children = engine.fork(
                root, [[1], [2], [3]], sampling=dataclasses.replace(FREE_RUN, repetition_penalty=1.2)
            )
            engine.run()
            engine.join(root, children, tokens=[4], sampling=FREE_RUN)
            engine.run()
            assert engine.scheduler._step_back(root.family) > 0
            engine.append(root, [4], sampling=FREE_RUN)
            engine.run()
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert compiled == [] and engine.runner.num_compiles == num_programs


@pytest.mark.slow
def test_pages_are_updated_in_place():
    """A decode dispatch holds no second copy of the cache: pages are aliased, temporaries small beside them."""
    cache = CacheConfig(page_size=4, num_pages=20_000)
    engine = EngineCore(MODEL, tiny_decoder(MODEL), byte_tokenizer(), cache_config=cache, engine_config=CONFIG)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.runner.pages))
    plan = engine.plans.build([], 8, CONFIG.max_threads, engine.plans.item_buckets(8)[0])
    memory = engine.runner.decode_memory(engine._empty_decode_batch(plan))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < 0.1 * cache_bytes
