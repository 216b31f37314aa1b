"""Edges of the primitives and the scheduler."""

import pytest
from scripted_threads import assert_clean, held, make_engine, stopped_root, up_to

from apr_jax.engine import events
from apr_jax.engine.thread import Status
from apr_jax.types import OutOfPages, SamplingParams


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


@pytest.mark.parametrize("stop_ids", [(), (98,)])
@pytest.mark.parametrize("said_more", [False, True])
@pytest.mark.parametrize("spawns", [False, True])
def test_a_fork_taken_back_leaves_the_thread_where_it_was(stop_ids, said_more, spawns):
    engine = make_engine()
    root = engine.submit([1, 2, 3], sampling=SamplingParams(max_new_tokens=4, stop_ids=stop_ids, ignore_eos=True))
    engine.run()
    said = held(root)
    if spawns:
        children = engine.spawn(root, [[5, 6], [7]], sampling=up_to(3))
    else:
        children = engine.fork(root, [[5, 6], [7]], sampling=up_to(3), carry=True)
    if said_more:
        engine.run()
    engine.join(root, [], mode="select", sampling=up_to(0))
    engine.run()
    assert root.stop.reason == "prefilled" and held(root) == said
    assert root.joins[-1].children == () and root.joins[-1].dropped == tuple(children)
    (child,) = engine.fork(root, [[]], sampling=up_to(2))
    engine.run()
    assert held(child)[: len(said)] == said and len(held(child)) == len(said) + 2
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


def test_a_stop_id_given_twice_is_one():
    engine = make_engine(max_stop_ids=2)
    sampling = SamplingParams(max_new_tokens=60, stop_ids=(110, 111, 110, 111), ignore_eos=True)
    root = engine.submit([1, 2], sampling=sampling)
    engine.run()
    assert root.stop.reason == "stop_id" and root.token_ids[-1] == 110 and not root.pending
    assert_clean(engine)
