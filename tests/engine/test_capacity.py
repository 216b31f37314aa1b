"""Slots, pages, bounds: who runs when there is not enough for all."""

import pytest
from scripted_threads import assert_clean, make_engine, preempted, stopped_root, up_to

from apr_jax.engine.thread import Status
from apr_jax.types import OutOfPages


def test_more_children_are_joined_than_there_are_slots():
    engine = make_engine(max_threads=2, prefill_rows=4)
    root = stopped_root(engine)
    children = engine.fork(root, [[5], [6], [7]], sampling=up_to(2))
    engine.run()
    engine.join(root, children, tokens=[9], sampling=up_to(1))
    engine.run()
    assert root.stop.reason == "length"
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
