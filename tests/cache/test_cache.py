"""What each operation promises, one at a time."""

import pytest

from apr_jax.cache import KVCache, PagePool, marked_segments, own_segments
from apr_jax.config import CacheConfig
from apr_jax.types import OutOfPages


def make(num_pages: int = 33, page_size: int = 4, prefix_cache: bool = True, max_tail_pages: int = 4) -> KVCache:
    config = CacheConfig(page_size=page_size, num_pages=num_pages, prefix_cache=prefix_cache)
    return KVCache(config, max_tail_pages)


def write(cache: KVCache, context, tokens) -> None:
    tokens = list(tokens)
    while tokens:
        n = min(len(tokens), cache.tail_room(context))
        cache.reserve(context, n)
        cache.advance(context, tokens[:n])
        tokens = tokens[n:]
    cache.check()


def all_tokens(context) -> list[int]:
    return [token for segment in context.segments for token in segment.token_ids]


def test_pool_counts():
    pool = PagePool(5)
    pages = pool.allocate(3)
    assert 0 not in pages and pool.num_free == 1 and pool.num_used == 3 and pool.total == 4
    with pytest.raises(OutOfPages, match="2 pages needed, 1 available"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert pool.is_in_use(pages[0])
    pool.release(pages[0])
    assert not pool.is_in_use(pages[0]) and pool.num_free == 2
    for wrong in (pages[0], 0, 5):
        with pytest.raises(ValueError, match="not in use"):
            pool.release(wrong)
    pool.check()


def test_a_full_tail_is_sealed_without_waste():
    cache = make(prefix_cache=False)
    context = cache.new_context()
    write(cache, context, range(16))
    assert cache.tail_room(context) == 16
    assert context.tail_len == 16
    write(cache, context, [16])
    assert [segment.num_tokens for segment in context.segments] == [16, 1]
    assert context.next_position == 17 and cache.num_unused_slots == 3
    with pytest.raises(ValueError, match="16 tokens to reserve, the tail has room for 15"):
        cache.reserve(context, 16)


def test_pages_needed_is_what_reserve_takes():
    cache = make()
    context = cache.new_context()
    for n in (1, 2, 1, 5, 7, 16):
        needed, free = cache.pages_needed(context, n), cache.pool.num_free
        cache.reserve(context, n)
        assert cache.pool.num_free == free - needed
        cache.advance(context, range(n))
    assert cache.pages_needed(context, 100) == 25  # over several tails


def test_tokens_must_be_reserved():
    cache = make()
    context = cache.new_context()
    with pytest.raises(ValueError, match="1 tokens written, 0 reserved"):
        cache.advance(context, [1])
    cache.reserve(context, 2)
    with pytest.raises(ValueError, match="5 tokens written, 4 reserved"):
        cache.advance(context, range(5))


def test_rollback_keeps_to_the_tail():
    cache = make()
    context = cache.new_context()
    write(cache, context, range(6))
    cache.rollback(context, 2)
    assert all_tokens(context) == [0, 1, 2, 3] and context.next_position == 4
    with pytest.raises(ValueError, match="rollback of 5 tokens, the open tail has 4"):
        cache.rollback(context, 5)
    cache.trim(context)
    assert cache.pool.num_used == 1


def test_fork_copies_nothing():
    cache = make()
    parent = cache.new_context()
    write(cache, parent, range(6))
    used = cache.pool.num_used
    children = cache.fork(parent, 3)
    assert cache.pool.num_used == used
    assert all(child.segments == parent.segments and child.next_position == 6 for child in children)
    assert all(own_segments(child) == [] for child in children)
    with pytest.raises(ValueError, match="0 children"):
        cache.fork(parent, 0)


def test_stitch_is_not_causal_and_select_is():
    cache = make()
    parent = cache.new_context()
    write(cache, parent, range(6))
    a, b = cache.fork(parent, 2)
    write(cache, a, [10, 11])
    write(cache, b, [20, 21, 22])
    with pytest.raises(ValueError, match="is open"):
        cache.join(parent, [own_segments(a)], 8)
    cache.seal(a)
    cache.seal(b)
    used = cache.pool.num_used
    chosen, _ = cache.fork(parent, 2)
    cache.join(chosen, [own_segments(a)], 8)
    assert chosen.causal and all_tokens(chosen) == [*range(6), 10, 11]
    cache.join(parent, [own_segments(a), own_segments(b)], 9)
    assert not parent.causal and parent.next_position == 9
    assert all_tokens(parent) == [*range(6), 10, 11, 20, 21, 22]
    assert cache.pool.num_used == used
    cache.release(a)
    cache.release(b)
    cache.check()
    assert cache.pool.num_used == used


def test_conclusion_takes_what_follows_the_last_mark():
    cache = make()
    parent = cache.new_context()
    write(cache, parent, range(5))
    (child,) = cache.fork(parent, 1)
    assert marked_segments(child) == []
    write(cache, child, [1, 2])
    cache.mark(child)
    write(cache, child, [3])
    cache.mark(child)
    write(cache, child, [4, 5])
    cache.seal(child)
    cache.join(parent, [marked_segments(child)], child.next_position)
    assert all_tokens(parent) == [*range(5), 4, 5]
    assert parent.next_position == 10 and not parent.causal


def test_a_gap_in_positions_is_not_causal():
    cache = make()
    parent = cache.new_context()
    write(cache, parent, range(4))
    (child,) = cache.fork(parent, 1)
    write(cache, child, range(4))
    cache.mark(child)
    cache.join(parent, [marked_segments(child)], child.next_position)  # an empty conclusion
    assert not parent.causal and parent.next_position == 8
    write(cache, parent, range(4))
    cache.seal(parent)
    assert parent.segments[-1].start_position == 8 and parent.segments[-1].node is None


def test_forks_and_marks_survive_a_split():
    cache = make(page_size=2)
    parent = cache.new_context()
    write(cache, parent, range(6))
    (child,) = cache.fork(parent, 1)
    write(cache, child, [10, 11])
    cache.mark(child)
    write(cache, child, [12])
    cache.seal(child)
    assert (child.fork_index, child.mark_index, len(child.segments)) == (1, 2, 3)
    cache.match_prefix([0, 1, 2])
    assert (child.fork_index, child.mark_index, len(child.segments)) == (2, 3, 4)
    assert [s.token_ids for s in own_segments(child)] == [[10, 11], [12]]
    assert [s.token_ids for s in marked_segments(child)] == [[12]]
    assert parent.segments == child.segments[:2]


def test_select_stays_causal_after_splits():
    cache = make(page_size=2)
    parent = cache.new_context()
    write(cache, parent, range(6))
    (child,) = cache.fork(parent, 1)
    write(cache, child, [10, 11, 12, 13])
    cache.seal(child)
    cache.match_prefix([0, 1, 2])  # splits what the parent ends with
    cache.match_prefix([*range(6), 10, 11, 5])  # and what the child wrote
    cache.join(parent, [own_segments(child)], child.next_position)
    assert parent.causal and len(parent.segments) == 4
    write(cache, parent, [14, 15])
    cache.seal(parent)
    assert cache.match_prefix([*range(6), *range(10, 17)])[1] == 12


def test_identical_children_share_pages_and_both_count():
    cache = make(page_size=2)
    parent = cache.new_context()
    write(cache, parent, range(4))
    children = cache.fork(parent, 2)
    for child in children:
        write(cache, child, [7, 8, 9, 10])
    parts = []
    for child in children:
        cache.seal(child)
        parts.append(own_segments(child))
    assert parts[0] == parts[1]
    cache.join(parent, parts, 8)
    assert all_tokens(parent) == [*range(4), 7, 8, 9, 10, 7, 8, 9, 10]
    assert cache.pool.num_used == 4
    cache.check()


def test_parts_survive_a_split():
    cache = make(page_size=2)
    parent = cache.new_context()
    write(cache, parent, range(4))
    long, short = cache.fork(parent, 2)
    write(cache, long, [7, 8, 9, 10])
    write(cache, short, [7, 8, 5])
    cache.seal(long)
    part = own_segments(long)
    cache.seal(short)  # splits what `part` holds
    cache.join(parent, [part, own_segments(short)], 8)
    assert all_tokens(parent) == [*range(4), 7, 8, 9, 10, 7, 8, 5]
    cache.check()


def test_a_prompt_is_shared_and_one_token_is_left():
    cache = make()
    first = cache.new_context()
    write(cache, first, range(12))
    cache.commit_prefix(first)
    assert first.tail is None
    for length, want in ((12, 8), (13, 12), (7, 4), (4, 0), (1, 0), (0, 0)):
        context, matched = cache.match_prefix(list(range(length)))
        assert matched == context.next_position == context.num_tokens == want
        assert all(segment in first.segments for segment in context.segments)
    assert cache.match_prefix([0, 1, 2, 3, 9, 9])[1] == 4
    cache.check()


def test_the_second_to_commit_adopts():
    cache = make()
    contexts = [cache.new_context() for _ in range(2)]
    for context in contexts:
        write(cache, context, range(10))
    assert cache.pool.num_used == 6
    for context in contexts:
        cache.commit_prefix(context)
    assert cache.pool.num_used == 4
    assert contexts[0].segments[0] is contexts[1].segments[0]
    assert all(context.tail_len == 2 for context in contexts)


def test_positions_are_part_of_the_key():
    cache = make()
    context = cache.new_context(start_position=5)
    write(cache, context, range(8))
    cache.seal(context)
    assert cache.match_prefix(list(range(9)))[1] == 0


def test_no_prefix_cache():
    cache = make(prefix_cache=False)
    context = cache.new_context()
    write(cache, context, range(9))
    cache.seal(context)
    assert cache.match_prefix(list(range(9)))[1] == 0
    cache.release(context)
    assert cache.pool.num_free == cache.pool.total


def test_new_weights_empty_the_cache_for_good():
    cache = make()
    context = cache.new_context()
    write(cache, context, range(9))
    cache.flush_prefix_cache()
    cache.seal(context)
    assert cache.match_prefix(list(range(9)))[1] == 0
    cache.check()


def test_the_least_recently_used_leaf_goes_first():
    cache = make(num_pages=7)
    for start in (0, 100):
        context = cache.new_context()
        write(cache, context, range(start, start + 12))
        cache.commit_prefix(context)
        cache.release(context)
    assert cache.num_cached_pages == 6
    cache.release(cache.match_prefix(range(13))[0])  # the older one is used again
    context = cache.new_context()
    write(cache, context, range(200, 208))
    assert cache.match_prefix([*range(100, 112), 0])[1] == 4  # only its last pages went
    held, matched = cache.match_prefix(range(13))
    assert matched == 12
    with pytest.raises(OutOfPages, match="4 pages needed, 0 available"):
        cache.reserve(cache.new_context(), 16)
    cache.release(held)
    cache.check()


def test_nothing_in_use_is_evicted():
    cache = make(num_pages=5)
    context = cache.new_context()
    write(cache, context, range(16))
    cache.seal(context)
    with pytest.raises(OutOfPages):
        cache.reserve(context, 1)
    assert all_tokens(context) == list(range(16))
    cache.check()


def test_preemption_keeps_the_segments():
    cache = make()
    parent = cache.new_context()
    write(cache, parent, range(9))
    (child,) = cache.fork(parent, 1)
    write(cache, child, [1, 2])
    cache.reserve(child, 9)
    cache.trim(child)
    segments = list(child.segments)
    copies = cache.swap_out([*segments, *parent.segments])
    assert [segment for segment, _ in copies] == segments
    assert sum(len(pages) for _, pages in copies) == cache.pool.num_used
    for segment, pages in copies:
        cache.finish_swap_out(segment, list(pages))
        cache.check()
    assert cache.pool.num_used == 0 and cache.num_cached_pages == 0
    blocker = cache.new_context()
    while cache.pool.num_free > 1:
        write(cache, blocker, range(4))
        cache.mark(blocker)
    with pytest.raises(OutOfPages):
        cache.swap_in(segments)
    cache.release(blocker)
    back = cache.swap_in(segments)
    assert [(segment, len(pages)) for segment, pages in back] == [(s, len(s.host_data)) for s in segments]
    for segment, _ in back:
        cache.finish_swap_in(segment)
        assert segment.host_data is None and not segment.swapped
    assert child.segments == segments and child.tail_len == 2
    assert cache.swap_in(segments) == []
    cache.check()


def test_a_context_is_released_once():
    cache = make()
    context = cache.new_context()
    write(cache, context, range(3))
    cache.release(context)
    with pytest.raises(ValueError, match="released twice"):
        cache.release(context)
    assert cache.pool.num_free == cache.pool.total


@pytest.mark.parametrize("bad", ["max_tail_pages", "start_position"])
def test_refuses_sizes(bad):
    with pytest.raises(ValueError, match=f"{bad} is"):
        if bad == "max_tail_pages":
            make(max_tail_pages=0)
        else:
            make().new_context(-1)


def test_check_finds_a_lost_page():
    cache = make()
    context = cache.new_context()
    write(cache, context, range(6))
    page = context.segments[0].pages.pop()
    with pytest.raises(AssertionError):
        cache.check()
    context.segments[0].pages.append(page)
    context.segments[0].refs += 1
    with pytest.raises(AssertionError, match="has 2 references"):
        cache.check()
