"""What the plan of some threads looks like. That every token is read once is tested by random operations."""

import functools

import numpy as np
import pytest
from apr_kernels.plan import validate_plan

from apr_jax.cache import Context, KVCache, PlanBuilder, PlanOverflow, own_segments
from apr_jax.config import CacheConfig, EngineConfig

CACHE = CacheConfig(page_size=4, num_pages=200, prefix_cache=False)


def builder(**settings) -> PlanBuilder:
    return PlanBuilder(
        CACHE,
        EngineConfig(**{"max_tail_pages": 8, "item_pages": 2, "min_shared_tokens": 8, "max_partials": 4, **settings}),
    )


def grow(cache: KVCache, context: Context, num_tokens: int) -> None:
    while num_tokens:
        n = min(num_tokens, cache.tail_room(context))
        cache.reserve(context, n)
        cache.advance(context, range(n))
        num_tokens -= n


def family(prompt: int, children: int, own: int) -> tuple[KVCache, Context, list[Context]]:
    cache = KVCache(CACHE, 8)
    parent = cache.new_context()
    grow(cache, parent, prompt)
    contexts = cache.fork(parent, children)
    for context in contexts:
        grow(cache, context, own)
    return cache, parent, contexts


def used(plan) -> np.ndarray:
    return np.flatnonzero(plan.rows[:, 1] > plan.rows[:, 0])


def check(plan):
    validate_plan(plan, num_pages=CACHE.num_pages, page_size=CACHE.page_size)


def test_a_shared_prompt_is_read_once():
    _, parent, contexts = family(prompt=21, children=3, own=2)
    plan = builder().build([(i, c) for i, c in enumerate(contexts)], 4, 8)
    check(plan)
    shared = [w for w in used(plan) if w < plan.num_shared]
    assert [list(plan.rows[w]) for w in shared] == [[0, 3]] * 3
    assert list(plan.pages[shared].ravel()) == parent.segments[0].pages
    assert list(plan.fills[shared].ravel()) == [4, 4, 4, 4, 4, 1]
    assert len(set(plan.partial_start[shared])) == 1  # one run
    assert len(used(plan)) == 3 + 3
    assert list(plan.row_slot) == [0, 1, 2, 8]


def test_a_short_run_is_read_privately():
    _, _, contexts = family(prompt=7, children=3, own=2)
    threads = [(i, c) for i, c in enumerate(contexts)]
    assert (used(builder().build(threads, 4, 8)) >= builder().build(threads, 4, 8).num_shared).all()
    shared = builder(min_shared_tokens=7).build(threads, 4, 8)
    assert (used(shared) < shared.num_shared).sum() == 1


def test_short_segments_of_the_same_readers_are_packed():
    cache, parent, contexts = family(prompt=3, children=2, own=3)
    for context in contexts:
        cache.seal(context)
    cache.join(parent, [own_segments(context) for context in contexts], 6)
    readers = cache.fork(parent, 2)
    plan = builder().build(list(enumerate(readers)), 2, 8)
    check(plan)
    shared = [w for w in used(plan) if w < plan.num_shared]
    assert plan.fills[shared].tolist() == [
        [3, 3],
        [3, 0],
    ]  # nine tokens in three partly filled pages, one run


def test_rows_are_sorted_across_families():
    cache, _, first = family(prompt=16, children=2, own=1)
    other = cache.new_context()
    grow(cache, other, 16)
    second = cache.fork(other, 2)
    threads = [(5, first[0]), (1, second[0]), (3, first[1]), (0, second[1])]
    plan = builder().build(threads, 4, 8)
    check(plan)
    assert [set(plan.row_slot[:2]), set(plan.row_slot[2:])] == [{5, 3}, {1, 0}]
    assert sorted(map(tuple, plan.rows[used(plan)][:4])) == [(0, 2), (0, 2), (2, 4), (2, 4)]


def test_readers_that_are_no_interval_are_split():
    cache, _, (a, b, c) = family(prompt=9, children=3, own=12)
    for context in (a, b, c):
        cache.seal(context)
    segment = own_segments(a)[0]
    cache.join(c, [[segment]], 30)
    plan = builder().build([(0, a), (1, b), (2, c)], 4, 8)
    check(plan)
    rows = [tuple(plan.rows[w]) for w in used(plan) if set(segment.pages) & set(plan.pages[w])]
    assert set(rows) == {(0, 1), (2, 3)}


def test_tails_cover_what_is_reserved():
    cache = KVCache(CACHE, 8)
    context = cache.new_context()
    cache.reserve(context, 25)
    cache.advance(context, range(3))
    plan = builder().build([(6, context)], 1, 8)
    check(plan)
    assert plan.tail_offset[used(plan)].tolist() == [0, 8, 16, 24]
    assert (plan.tail_slot[used(plan)] == 6).all()
    assert plan.tail_pages[6, :7].tolist() == context.segments[0].pages
    assert plan.num_shared == 0


def test_item_buckets_hold_what_they_say():
    plans = builder()
    small, large = plans.item_buckets(4)
    assert 0 < plans.build([], 4, 8, small).num_shared < small < large
    _, _, contexts = family(prompt=300, children=3, own=2)
    threads = list(enumerate(contexts))
    assert plans.build(threads, 4, 8).num_items == large
    with pytest.raises(PlanOverflow) as error:
        plans.build(threads, 4, 8, num_items=small)
    assert error.value.what == "items" and error.value.needed == 38 > error.value.bound
    with pytest.raises(ValueError, match="num_items is 3, must be one of"):
        plans.build(threads, 4, 8, num_items=3)
    few, many = plans.build(threads[:1], 1, 8).num_items, plans.item_buckets(1)
    assert few in many


def test_too_many_partials_are_named():
    cache = KVCache(CACHE, 8)
    context, contexts = cache.new_context(), []
    for _ in range(4):  # each level is read by one row fewer
        grow(cache, context, 8)
        context, sibling = cache.fork(context, 2)
        contexts.append(sibling)
    contexts.append(context)
    threads = list(enumerate(contexts))
    for each in contexts:
        grow(cache, each, 1)
    check(builder(max_partials=5).build(threads, 8, 8))
    with pytest.raises(PlanOverflow, match="needs 5 partials, at most 4"):
        builder().build(threads, 8, 8)


def test_refuses_what_does_not_fit():
    cache, _, contexts = family(prompt=4, children=3, own=1)
    with pytest.raises(ValueError, match="3 threads for 2 rows"):
        builder().build(list(enumerate(contexts)), 2, 8)
    for slots in ((0, 0), (0, 8)):
        with pytest.raises(ValueError, match="slots"):
            builder().build(list(zip(slots, contexts)), 2, 8)
    for segment, pages in cache.swap_out(contexts[0].segments[-1:]):
        cache.finish_swap_out(segment, pages)
    with pytest.raises(ValueError, match="slot 0 is in host memory"):
        builder().build([(0, contexts[0])], 1, 8)


def runs(plan) -> list[int]:
    """Number of items of each run, in order."""
    items = {}
    for w in used(plan):
        key = (*plan.rows[w].tolist(), int(plan.partial_start[w]))
        items[key] = items.get(key, 0) + 1
    return list(items.values())


def test_a_long_thread_is_cut_until_it_fills_the_chip():
    cache = KVCache(CACHE, 8)
    context = cache.new_context()
    grow(cache, context, 35 * 4)  # four full tails, sealed: 16 items; three pages in the last: 2

    def build(**settings):
        return builder(**settings).build([(0, context)], 1, 8)

    assert runs(build(max_partials=8)) == [18]
    assert runs(build(max_partials=8, target_runs=3)) == [6, 6, 6]
    assert runs(build(max_partials=8, target_runs=7)) == [3, 3, 3, 3, 3, 3]
    assert runs(build(max_partials=8, target_runs=1000)) == [3, 3, 3, 3, 3, 3]  # 8 would be cut in 9
    assert runs(build(max_partials=18, target_runs=1000)) == [1] * 18
    plan = build(max_partials=8, target_runs=3)
    check(plan)
    assert (plan.partials[0] >= 0).sum() == 3


def test_a_wide_chunk_fills_the_chip_with_few_runs():
    cache = KVCache(CACHE, 8)
    context = cache.new_context()
    grow(cache, context, 35 * 4)
    plans = builder(target_runs=6, max_partials=64)
    assert [len(runs(plans.build([(0, context)], 1, 8, num_queries=n))) for n in (1, 64, 128, 192, 2048)] == [
        6,
        6,
        3,
        2,
        1,
    ]


def test_many_short_runs_are_not_cut():
    _, _, contexts = family(prompt=7, children=6, own=5)
    plan = builder(target_runs=4).build(list(enumerate(contexts)), 8, 8)
    assert len(runs(plan)) == 6


def test_a_tail_that_takes_pages_patches_copies():
    cache, _, contexts = family(prompt=21, children=3, own=2)
    plans, threads = builder(), list(enumerate(contexts))
    before = plans.build(threads, 4, 8)
    assert plans.build(threads, 4, 8) is before
    pages, tail_pages = before.pages.copy(), before.tail_pages.copy()
    grow(cache, contexts[1], 4)  # a second page, in the tail's first item
    patched = plans.build(threads, 4, 8)
    check(patched)
    assert patched.fills is before.fills and patched.partials is before.partials
    assert patched.tail_pages[1, :2].tolist() == contexts[1].segments[-1].pages
    assert (before.pages == pages).all() and (before.tail_pages == tail_pages).all()
    with pytest.raises(ValueError, match="read-only"):
        patched.pages[0, 0] = 1
    grow(cache, contexts[1], 4)  # a third: another item
    longer = plans.build(threads, 4, 8)
    check(longer)
    assert len(used(longer)) == len(used(patched)) + 1


def test_a_plan_after_one_that_failed_is_right():
    cache, _, contexts = family(prompt=21, children=3, own=2)
    plans, threads = builder(), list(enumerate(contexts))
    plans.build(threads, 4, 8)
    grow(cache, contexts[1], 4)
    with pytest.raises(ValueError, match="slots"):
        plans.build([*threads[:2], (1, contexts[2])], 4, 8)
    check(plans.build(threads, 4, 8))
    assert plans.build(threads, 4, 8).tail_pages[1, :2].tolist() == contexts[1].segments[-1].pages


def test_a_plan_after_one_that_overflowed_is_right():
    cache = KVCache(CACHE, 8)
    context = cache.new_context()
    grow(cache, context, 88)
    cache.seal(context)
    grow(cache, context, 8)  # a tail of one item
    plans, (small, _) = builder(), builder().item_buckets(1)
    build = functools.partial(plans.build, [(0, context)], 1, 8, small)
    assert len(used(build())) == small == 12
    for _ in range(2):
        grow(cache, context, 4)
        with pytest.raises(PlanOverflow, match="needs 13 items, at most 12"):
            build()
    cache.rollback(context, 8)
    cache.trim(context)
    check(build())


def test_segments_that_came_back_to_other_pages_are_seen():
    cache, parent, contexts = family(prompt=21, children=3, own=5)
    for context in contexts:
        cache.seal(context)
    plans, threads = builder(), list(enumerate(contexts))
    before = plans.build(threads, 4, 8)
    segments = [segment for context in contexts for segment in context.segments]
    for segment, pages in cache.swap_out(segments):
        cache.finish_swap_out(segment, pages)
    cache.swap_in(segments[::-1])
    after = plans.build(threads, 4, 8)
    check(after)
    shared = [w for w in used(after) if w < after.num_shared]
    assert after.pages[shared].ravel().tolist() == parent.segments[0].pages
    assert (after.pages != before.pages).any()
