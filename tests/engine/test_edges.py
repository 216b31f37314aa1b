"""Edges of the primitives and the scheduler, with threads that say what a script says."""

import pytest

from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine import events
from apr_jax.engine.engine import EngineCore
from apr_jax.engine.thread import Status, Thread
from apr_jax.testing import byte_tokenizer, tiny_config
from apr_jax.testing.scripted import ScriptedRunner
from apr_jax.types import OutOfPages, SamplingParams


def make_engine(
    *,
    max_position: int = 1024,
    page_size: int = 4,
    num_pages: int = 200,
    prefix_cache: bool = True,
    **fields,
) -> EngineCore:
    config = EngineConfig(**fields)
    return EngineCore(
        tiny_config(max_position=max_position),
        None,
        byte_tokenizer(),
        cache_config=CacheConfig(page_size=page_size, num_pages=num_pages, prefix_cache=prefix_cache),
        engine_config=config,
        runner=ScriptedRunner(lambda thread, ids: 97 + len(ids) % 20, config.steps_per_dispatch),
    )


def up_to(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True)


def stopped_root(engine: EngineCore, prompt=(1, 2, 3), count: int = 4) -> Thread:
    root = engine.submit(prompt, sampling=up_to(count))
    engine.run()
    return root


def held(thread: Thread) -> list[int]:
    return [token for segment in thread.context.segments for token in segment.token_ids] + thread.pending


def assert_clean(engine: EngineCore) -> None:
    for family in list(engine.scheduler.families.values()):
        engine.cancel(family.root)
    engine.cache.flush_prefix_cache()
    engine.cache.check()
    assert engine.cache.pool.num_free == engine.cache.pool.total


def test_select_hands_on_what_a_child_never_fed():
    engine = make_engine()
    root = stopped_root(engine)
    said = held(root)
    children = engine.fork(root, [[], []], sampling=up_to(0))
    engine.run()
    engine.join(root, children[:1], mode="select", sampling=up_to(2))
    engine.run()
    assert held(root)[: len(said)] == said and len(held(root)) == len(said) + 2
    assert_clean(engine)


def test_children_stopped_by_the_window_before_they_ran_are_joined():
    engine = make_engine(max_position=16)
    root = stopped_root(engine, [1] * 10, 40)
    assert root.stop.reason == "context"
    said = held(root)
    children = engine.fork(root, [[], [5, 6]], sampling=up_to(3))
    engine.run()
    assert [child.stop.reason for child in children] == ["context", "context"]
    engine.join(root, children, tokens=[9], sampling=up_to(3))
    engine.run()
    assert held(root) == [*said, 5, 6, 9], "the carried token once, then what the second child was given"
    assert_clean(engine)


def test_more_children_are_joined_than_there_are_slots():
    engine = make_engine(max_threads=2, prefill_rows=4)
    root = stopped_root(engine)
    children = engine.fork(root, [[5], [6], [7]], sampling=up_to(2))
    engine.run()
    engine.join(root, children, tokens=[9], sampling=up_to(1))
    engine.run()
    assert root.stop.reason == "length"
    assert_clean(engine)


def test_a_spawn_keeps_the_threads_last_token():
    engine = make_engine()
    root = stopped_root(engine)
    said = held(root)
    children = engine.spawn(root, [[7, 8]], sampling=up_to(2))
    engine.run()
    engine.join(root, children, mode="splice", tokens=[9], sampling=up_to(0))
    engine.run()
    assert held(root) == [*said, 9]
    assert_clean(engine)


@pytest.mark.parametrize("kept_first", [True, False])
def test_a_newcomer_takes_the_pages_of_families_that_rest(kept_first):
    engine = make_engine(num_pages=101)
    if not kept_first:
        engine.submit([3], sampling=up_to(0))
    kept = stopped_root(engine, [1] * 240, 0)
    newcomer = engine.submit([2] * 200, sampling=up_to(3))
    engine.run()
    assert newcomer.stop.reason == "length"
    engine.append(kept, [4], sampling=up_to(3))
    engine.run()
    assert kept.stop.reason == "length"
    assert_clean(engine)


@pytest.mark.parametrize("kind", [events.ForkEvent, events.JoinEvent, events.FinishEvent, events.TokenEvent])
@pytest.mark.parametrize("primitive", ["append", "fork", "spawn", "join"])
def test_a_listener_cancels_within_a_primitive(kind, primitive):
    engine = make_engine()
    root = stopped_root(engine)
    children = []
    if primitive == "join":
        children = engine.fork(root, [[5], [6]], sampling=up_to(2))
        engine.run()
    seen = []

    def cancel(event):
        if isinstance(event, kind) and not seen:
            seen.append(event)
            engine.cancel(root)

    engine.listeners.append(cancel)
    if primitive == "append":
        engine.append(root, [4], sampling=up_to(2))
    elif primitive == "join":
        engine.join(root, children, tokens=[4], sampling=up_to(2))
    else:
        getattr(engine, primitive)(root, [[5], [6]], sampling=up_to(2))
    if seen:
        assert root.status is Status.CANCELLED
    engine.run()
    assert all(t.is_done or t.status is Status.STOPPED or not seen for t in root.family.threads)
    assert_clean(engine)


def test_a_conclusion_does_not_pin_what_led_to_it():
    engine = make_engine(page_size=1)
    root = stopped_root(engine)
    (child,) = engine.fork(root, [[5]], sampling=up_to(60))
    engine.run()
    engine.mark(child)
    engine.append(child, [7], sampling=up_to(3))
    engine.run()
    engine.join(root, [child], mode="conclusion", tokens=[9], sampling=up_to(2))
    engine.run()
    used = engine.scheduler.family_pages(root.family)
    assert used < 20 and engine.cache.num_available == engine.cache.pool.total - used
    assert_clean(engine)


def test_a_context_beyond_the_largest_plan_is_refused_or_stops():
    """Children that said the same share pages, so that a context can read more pages than there are."""
    engine = make_engine(page_size=1, num_pages=300, item_pages=1, max_tail_pages=4)
    total = engine.cache.pool.total
    root = stopped_root(engine)
    children = engine.fork(root, [[5]] * 6, sampling=up_to(30))
    engine.run()
    engine.join(root, children, tokens=[9], sampling=up_to(3))
    engine.run()
    assert engine.scheduler.family_pages(root.family) < 60 < len(held(root))
    children = engine.fork(root, [[5]] * 6, sampling=up_to(30))
    engine.run()
    assert [child.stop.reason for child in children] == ["length"] * 6
    with pytest.raises(OutOfPages, match=f"{total} available in one thread's context"):
        engine.join(root, children, tokens=[9], sampling=up_to(3))
    engine.join(root, children[:3], tokens=[9], sampling=up_to(500))
    engine.run()
    assert root.stop.reason == "pages" and len(held(root)) <= total + engine.config.max_tail_pages + 1
    (last,) = engine.fork(root, [[8]], sampling=up_to(3))
    engine.run()
    assert last.stop.reason == "pages"
    assert_clean(engine)


def test_a_large_newcomer_is_not_overtaken_for_ever():
    engine = make_engine(num_pages=101, max_threads=8)
    small = [engine.submit([i] * 8, sampling=up_to(60)) for i in range(4)]
    engine.step()
    large = engine.submit([200] * 320, sampling=up_to(3))
    for i in range(40):
        small.append(engine.submit([i + 10] * 8, sampling=up_to(60)))
        for thread in engine.step():
            if thread is not large:
                engine.release(thread)
    assert large.stop is not None and large.stop.reason == "length"
    engine.run()
    assert all(thread.is_done or thread.stop.reason == "length" for thread in small)
    assert_clean(engine)


def preempted(engine: EngineCore, family) -> list[events.PreemptEvent]:
    """Collects, from now on, the events in which this family gives up its pages."""
    found: list[events.PreemptEvent] = []

    def note(event):
        if isinstance(event, events.PreemptEvent) and event.family_id == family.id and not event.resumed:
            found.append(event)

    engine.listeners.append(note)
    return found


def test_a_forks_children_take_the_slot_of_a_younger_family():
    engine = make_engine(max_threads=2)
    engine.submit([1] * 8, sampling=up_to(200))
    middle = engine.submit([2] * 8, sampling=up_to(4))
    while middle.status is not Status.STOPPED:
        engine.step()
    young = engine.submit([3] * 8, sampling=up_to(200))
    engine.step()
    assert young.status is Status.RUNNING
    gave_up = preempted(engine, young.family)
    (child,) = engine.fork(middle, [[5]], sampling=up_to(4))
    engine.step()
    assert len(gave_up) == 1 and child.token_ids[1:], "the child ran in the younger family's slot"
    engine.run()
    assert young.stop.reason == "length"
    assert_clean(engine)


def test_nobody_loses_a_slot_to_a_thread_that_could_not_run():
    engine = make_engine(max_threads=2, num_pages=101)
    old = engine.submit([1] * 160, sampling=up_to(140))
    middle = engine.submit([2] * 200, sampling=up_to(40))
    while not any(segment.swapped for segment in middle.context.segments):
        engine.step()
    young = engine.submit([3] * 8, sampling=up_to(60))
    gave_up = preempted(engine, young.family)
    while old.stop is None:
        engine.step()
        waits_for_pages = middle.status is Status.WAITING
        assert not (waits_for_pages and gave_up), "the slot's pages are too few for the older thread"
    assert young.token_ids, "the young family ran beside the oldest"
    engine.run()
    assert [thread.stop.reason for thread in (old, middle, young)] == ["length"] * 3
    assert_clean(engine)


def test_a_family_at_its_bound_takes_no_slot():
    engine = make_engine(max_threads=2, max_family_pages=10)
    full = stopped_root(engine, [2] * 30, 30)
    assert full.stop.reason == "pages"
    engine.submit([1] * 8, sampling=up_to(30))
    young = engine.submit([3] * 8, sampling=up_to(30))
    engine.step()
    gave_up = preempted(engine, young.family)
    engine.append(full, [5], sampling=up_to(3))
    engine.run()
    assert not gave_up and full.stop.reason == "pages"
    assert_clean(engine)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_spawn_beyond_the_familys_bound_changes_nothing(prefix_cache):
    engine = make_engine(max_family_pages=10, prefix_cache=prefix_cache)
    root = stopped_root(engine, [1] * 8, 1)  # 2 pages
    available = engine.cache.num_available
    with pytest.raises(OutOfPages, match="14 pages needed, 10 available in the family's bound"):
        engine.spawn(root, [[2] * 17, [3] * 28], sampling=up_to(0))
    assert root.status is Status.STOPPED and engine.cache.num_available == available
    alike = [[4] * 20, [4] * 20]
    if prefix_cache:
        children = engine.spawn(root, alike, sampling=up_to(1))
        engine.run()
        assert [child.stop.reason for child in children] == ["length"] * 2
    else:
        with pytest.raises(OutOfPages, match="12 pages needed"):
            engine.spawn(root, alike, sampling=up_to(1))
        children = engine.spawn(root, alike[:1], sampling=up_to(1))
        engine.run()
    assert children[0].stop.reason == "length"
    assert_clean(engine)


def test_a_spawned_prompt_that_the_family_holds_is_not_counted_again():
    engine = make_engine(max_family_pages=10)
    root = stopped_root(engine, [1] * 33, 1)  # 8 whole pages, cached
    (child,) = engine.spawn(root, [[1] * 33], sampling=up_to(1))
    engine.run()
    assert child.stop.reason == "length" and child.family.counters.cached_tokens == 32
    assert_clean(engine)


@pytest.mark.parametrize("how", ["append", "fork", "select"])
def test_a_stop_that_is_sampled_from_after_all_is_no_flush(how):
    engine = make_engine()
    stops = SamplingParams(max_new_tokens=60, stop_ids=(110,), ignore_eos=True)
    root = engine.submit([1] * 8, sampling=stops)
    engine.run()
    counters = root.family.counters
    assert root.stop.reason == "stop_id" and not root.pending and counters.flush_tokens == 1
    said = held(root)
    if how == "append":
        engine.append(root, sampling=up_to(2))
        engine.run()
        assert counters.flush_tokens == 0 and held(root)[: len(said)] == said
    elif how == "fork":
        engine.fork(root, [[], []], sampling=up_to(2))
        engine.run()
        assert counters.flush_tokens == 0
    else:
        (child,) = engine.fork(root, [[5]], sampling=stops)
        engine.run()
        assert child.stop.reason == "stop_id" and counters.flush_tokens == 2
        engine.join(root, [child], mode="select", sampling=up_to(2))
        assert counters.flush_tokens == 1, "the root's, which was sealed"
    assert_clean(engine)


def test_unused_slots_are_measured():
    engine = make_engine(page_size=4, prefix_cache=False)
    root = stopped_root(engine, [1] * 6, 0)  # 5 tokens have keys: 3 slots of the second page are unused
    assert engine.cache.num_unused_slots == engine.stats.max_unused_slots == 3
    engine.fork(root, [[5], [6, 7]], sampling=up_to(2))  # the sixth is fed: 2 are unused
    engine.run()
    # The first child feeds 5 and a sampled token, the second 6, 7 and a sampled token.
    assert engine.cache.num_unused_slots == engine.stats.max_unused_slots == 2 + 2 + 1
    engine.cancel(root)
    assert engine.cache.num_unused_slots == 0 and engine.stats.max_unused_slots == 5
    assert_clean(engine)


def test_a_stop_id_given_twice_is_one():
    engine = make_engine(max_stop_ids=2)
    sampling = SamplingParams(max_new_tokens=60, stop_ids=(110, 111, 110, 111), ignore_eos=True)
    root = engine.submit([1, 2], sampling=sampling)
    engine.run()
    assert root.stop.reason == "stop_id" and root.token_ids[-1] == 110 and not root.pending
    assert_clean(engine)
