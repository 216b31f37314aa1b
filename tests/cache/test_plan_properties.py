"""Plans of any contexts against a brute force that walks pages, and incremental plans against rebuilt ones."""

import contextlib
from collections import Counter

import numpy as np
from apr_kernels.plan import DATA_FIELDS, Plan, validate_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apr_jax.cache import Context, KVCache, PlanBuilder, PlanOverflow, Segment, own_segments
from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.types import OutOfPages

NUM_SLOTS, NUM_ROWS = 12, 10
PAGES = CacheConfig(page_size=3, num_pages=400, prefix_cache=False)

SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
CONFIGS = st.builds(
    EngineConfig,
    item_pages=st.sampled_from([1, 2, 5]),
    max_tail_pages=st.just(5),
    max_partials=st.sampled_from([3, 6, 40]),
    min_shared_tokens=st.integers(0, 14),
    target_runs=st.sampled_from([1, 4, 9, 100]),
)


def pages_for(draw, free: list[int], num_pages: int) -> list[int]:
    return [free.pop(draw(st.integers(0, len(free) - 1))) for _ in range(num_pages)]


def sealed(draw, free: list[int]) -> Segment:
    tokens = draw(st.integers(0, 8))
    pages = pages_for(draw, free, -(-tokens // PAGES.page_size))
    return Segment(0, None, pages=pages, token_ids=list(range(tokens)), sealed=True)


@st.composite
def any_contexts(draw) -> dict[int, Context]:
    """Lists of segments in any order, some several times: no tree at all."""
    free = list(range(1, PAGES.num_pages))
    segments = [sealed(draw, free) for _ in range(draw(st.integers(1, 8)))]
    contexts = [
        Context(segments=draw(st.lists(st.sampled_from(segments), max_size=6)))
        for _ in range(draw(st.integers(0, NUM_ROWS)))
    ]
    return with_tails(draw, free, contexts)


@st.composite
def trees(draw) -> dict[int, Context]:
    """Nested forks: each context continues one before it by a segment of its own."""
    free = list(range(1, PAGES.num_pages))
    contexts = []
    for _ in range(draw(st.integers(1, NUM_ROWS))):
        before = contexts[draw(st.integers(0, len(contexts) - 1))].segments if contexts and draw(st.booleans()) else []
        contexts.append(Context(segments=[*before, sealed(draw, free)]))
    return with_tails(draw, free, contexts)


def with_tails(draw, free: list[int], contexts: list[Context]) -> dict[int, Context]:
    for context in contexts:
        if draw(st.booleans()):
            pages = pages_for(draw, free, draw(st.integers(1, 5)))
            tokens = draw(st.integers(0, len(pages) * PAGES.page_size))
            context.segments = [*context.segments, Segment(0, None, pages=pages, token_ids=list(range(tokens)))]
    slots = draw(st.permutations(range(NUM_SLOTS)))
    return dict(zip(slots, contexts))


def visible(context: Context) -> Counter:
    """(page, index in it) of every token a query sees."""
    seen = Counter()
    for segment in context.segments:
        for i in range(len(segment.token_ids)):
            seen[segment.pages[i // PAGES.page_size], i % PAGES.page_size] += 1
    return seen


def read_by_rows(plan: Plan, contexts: dict[int, Context]) -> dict[int, Counter]:
    """The same, as the items say, by slot."""
    read = {slot: Counter() for slot in contexts}
    for w in range(plan.num_items):
        for row in range(*plan.rows[w]):
            slot = int(plan.row_slot[row])
            for i, page in enumerate(plan.pages[w].tolist()):
                fill = int(plan.fills[w, i])
                if plan.tail_slot[w] >= 0:
                    tail = contexts[int(plan.tail_slot[w])].segments[-1]
                    fill = len(tail.token_ids) - int(plan.tail_offset[w]) - i * PAGES.page_size
                    fill = max(0, min(fill, PAGES.page_size))
                read[slot].update((page, index) for index in range(fill))
    return read


def expected_reads(plan: Plan, contexts: dict[int, Context], min_shared_tokens: int) -> Counter:
    """How often each page of sealed segments should be read, and by which rows: from each page's set of readers."""
    order = [int(slot) for slot in plan.row_slot if slot < NUM_SLOTS]
    fills, readers = {}, {}
    for row, slot in enumerate(order):
        times = Counter()
        for segment in contexts[slot].segments:
            for i, page in enumerate(segment.pages if segment.sealed else ()):
                times[page] += 1
                fills[page] = min(PAGES.page_size, len(segment.token_ids) - i * PAGES.page_size)
                readers.setdefault((page, times[page]), set()).add(row)
    by_interval = {}
    for (page, _), rows in readers.items():
        for lo in (row for row in rows if row - 1 not in rows):
            hi = min(row for row in range(lo, len(order) + 1) if row not in rows)
            by_interval.setdefault((lo, hi), []).append(page)
    reads = Counter()
    for (lo, hi), pages in by_interval.items():
        together = hi - lo > 1 and sum(fills[page] for page in pages) >= min_shared_tokens
        for page in pages:
            reads.update([(page, lo, hi)] if together else [(page, row, row + 1) for row in range(lo, hi)])
    return reads


def runs_of(plan: Plan) -> dict[tuple[int, int, int], int]:
    """Number of items of each (lo, hi, partial_start)."""
    used = plan.rows[:, 1] > plan.rows[:, 0]
    return Counter((*rows, start) for rows, start in zip(plan.rows[used].tolist(), plan.partial_start[used].tolist()))


def check_plan(contexts: dict[int, Context], config: EngineConfig) -> Plan | None:
    builder = PlanBuilder(PAGES, config)
    try:
        plan = builder.build(list(contexts.items()), NUM_ROWS, NUM_SLOTS)
    except PlanOverflow as error:
        assert (error.what, error.bound) == ("partials", config.max_partials)
        return None
    validate_plan(plan, num_pages=PAGES.num_pages, page_size=PAGES.page_size)
    assert sorted(plan.row_slot.tolist()) == sorted([*contexts, *[NUM_SLOTS] * (NUM_ROWS - len(contexts))])
    assert read_by_rows(plan, contexts) == {slot: visible(context) for slot, context in contexts.items()}
    reads = Counter()
    for w in np.flatnonzero((plan.rows[:, 1] > plan.rows[:, 0]) & (plan.tail_slot < 0)):
        reads.update((page, *plan.rows[w].tolist()) for page in plan.pages[w].tolist() if page)
    assert reads == expected_reads(plan, contexts, config.min_shared_tokens)
    return plan


@SETTINGS
@given(contexts=any_contexts(), config=CONFIGS)
def test_every_visible_token_is_read_once_whatever_the_contexts(contexts, config):
    check_plan(contexts, config)


@SETTINGS
@given(contexts=trees(), config=CONFIGS)
def test_the_readers_of_a_segment_of_a_tree_are_an_interval(contexts, config):
    plan = check_plan(contexts, config)
    if plan is None:
        return
    order = [int(slot) for slot in plan.row_slot if slot < NUM_SLOTS]
    for segment in {segment for context in contexts.values() for segment in context.segments}:
        rows = [row for row, slot in enumerate(order) if segment in contexts[slot].segments]
        assert rows == list(range(rows[0], rows[-1] + 1))


@SETTINGS
@given(contexts=st.one_of(any_contexts(), trees()), config=CONFIGS)
def test_runs_are_cut_no_finer_than_fills_the_chip(contexts, config):
    try:
        plan = PlanBuilder(PAGES, config).build(list(contexts.items()), NUM_ROWS, NUM_SLOTS)
    except PlanOverflow:
        return
    runs = runs_of(plan)
    whole = Counter((lo, hi) for lo, hi, _ in runs)
    share = -(-sum(runs.values()) // config.target_runs)  # items that each of target_runs would have
    assert len(runs) <= len(whole) + config.target_runs
    if max(runs.values(), default=0) > share:  # then P is why: one item less and some row has too many
        shorter = max(runs.values()) - 1
        items = Counter()
        for (lo, hi, _), count in runs.items():
            items[lo, hi] += count
        partials = [
            sum(-(-count // shorter) for (lo, hi), count in items.items() if lo <= row < hi) for row in range(NUM_ROWS)
        ]
        assert max(partials) > config.max_partials


class Threads:
    """Contexts that grow, fork, join and go; one builder sees every state of them, a new one each state alone."""

    def __init__(self, config: EngineConfig, prefix_cache: bool):
        self.page_size = PAGES.page_size
        cache_config = CacheConfig(page_size=3, num_pages=200, prefix_cache=prefix_cache)
        self.cache = KVCache(cache_config, config.max_tail_pages)
        self.contexts: dict[int, Context] = {}
        self.fresh = lambda: PlanBuilder(cache_config, config)
        self.builder = self.fresh()
        self.plans: list[tuple[Plan, dict[str, np.ndarray]]] = []

    def place(self, context: Context, choice: int) -> None:
        free = [slot for slot in range(NUM_SLOTS) if slot not in self.contexts]
        if len(self.contexts) < NUM_ROWS:
            self.contexts[free[choice % len(free)]] = context
        else:
            self.cache.release(context)

    def new(self, context, a: int, b: int) -> None:
        self.place(self.cache.match_prefix(list(range(b % 40 + 1)))[0], a)

    def grow(self, context: Context, a: int, b: int) -> None:
        n = min(a % 7, self.cache.tail_room(context))
        self.cache.reserve(context, n)
        self.cache.advance(context, range(n - b % 2 if n else 0))

    def grow_all(self, context: Context, a: int, b: int) -> None:
        for each in self.contexts.values():
            self.grow(each, a, b)

    def fork(self, context: Context, a: int, b: int) -> None:
        for child in self.cache.fork(context, 1 + a % 3):
            self.place(child, b)

    def join(self, context: Context, a: int, b: int) -> None:
        others = [each for each in self.contexts.values() if each is not context]
        children = others[a % 4 : a % 4 + 3]
        for child in children:
            self.cache.seal(child)
        end = max([context.next_position, *[child.next_position for child in children]])
        self.cache.join(context, [own_segments(child) for child in children], end)

    def cancel(self, context: Context, a: int, b: int) -> None:
        slot = next(slot for slot, each in self.contexts.items() if each is context)
        self.cache.release(self.contexts.pop(slot))

    def move(self, context: Context, a: int, b: int) -> None:
        slot = next(slot for slot, each in self.contexts.items() if each is context)
        self.place(self.contexts.pop(slot), a)

    def shorten(self, context: Context, a: int, b: int) -> None:
        self.cache.rollback(context, min(a, context.tail_len))
        if b % 2:
            self.cache.trim(context)

    def seal(self, context: Context, a: int, b: int) -> None:
        (self.cache.seal if a % 2 else self.cache.commit_prefix)(context)

    def swap(self, context: Context, a: int, b: int) -> None:
        """All go to host memory and come back to other pages."""
        for each in self.contexts.values():
            self.cache.trim(each)
        segments = [segment for each in self.contexts.values() for segment in each.segments]
        for segment, pages in self.cache.swap_out(segments):
            self.cache.finish_swap_out(segment, pages)
        for segment, _ in self.cache.swap_in(segments):
            self.cache.finish_swap_in(segment)

    OPERATIONS = (
        "grow", "grow", "grow", "grow", "grow", "grow_all", "grow_all", "new", "fork", "fork", "join", "cancel",
        "move", "shorten", "seal", "swap",
    )  # fmt: skip

    def apply(self, name: str, a: int, b: int) -> None:
        if not self.contexts:
            name = "new"
        context = list(self.contexts.values())[b % len(self.contexts)] if self.contexts else None
        with contextlib.suppress(OutOfPages):
            getattr(self, name)(context, a, b)
        self.compare()

    def compare(self) -> None:
        threads = list(self.contexts.items())
        built = []
        for builder, order in ((self.builder, threads), (self.fresh(), threads[::-1])):
            try:
                built.append(builder.build(order, NUM_ROWS, NUM_SLOTS))
            except PlanOverflow as error:
                built.append(str(error))
        patched, rebuilt = built
        if not isinstance(rebuilt, Plan):
            assert patched == rebuilt
            return
        assert isinstance(patched, Plan) and patched.num_shared == rebuilt.num_shared
        for name in DATA_FIELDS:
            np.testing.assert_array_equal(getattr(patched, name), getattr(rebuilt, name), err_msg=name)
        self.plans.append((patched, {name: getattr(patched, name).copy() for name in DATA_FIELDS}))
        for plan, copies in self.plans[-6:]:  # what a dispatch may still read
            for name, copy in copies.items():
                np.testing.assert_array_equal(getattr(plan, name), copy, err_msg=f"{name} of an earlier plan")


@SETTINGS
@given(
    config=CONFIGS,
    prefix_cache=st.booleans(),
    operations=st.lists(
        st.tuples(st.sampled_from(Threads.OPERATIONS), st.integers(0, 11), st.integers(0, 99)), min_size=5, max_size=40
    ),
)
def test_an_incremental_plan_is_the_rebuilt_one(config, prefix_cache, operations):
    threads = Threads(config, prefix_cache)
    for operation in operations:
        threads.apply(*operation)
