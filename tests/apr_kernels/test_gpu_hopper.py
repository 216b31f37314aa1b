"""The Hopper kernel, interpreted here and native on a GPU of compute capability 9.0.

The interpreter takes seconds a case. What the kernel is told (lists of pages, visibility, windows) is checked on all
cases by a walk of it in numpy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apr_kernels import backends, cases
from apr_kernels.kv_pages import make_kv_pages
from apr_kernels.kv_update import kv_update
from apr_kernels.paged_attention import gpu_hopper_merge, paged_attention
from apr_kernels.paged_attention.gpu_hopper import interpreter
from apr_kernels.paged_attention.gpu_hopper_memory import NEGATIVE
from apr_kernels.paged_attention.gpu_hopper_windows import HIDDEN, WINDOW_FIELDS, make_windows, prepare
from apr_kernels.paged_attention.merge import merge

from tests.apr_kernels.oracle import assert_as_exact_as_dense, oracle, updated

SIZES = [
    (case, size) for case in cases.CASES for size in ((8, 16, 64) if case.name in ("joined", "prefill") else (16,))
]
INTERPRETED = [
    pytest.param(
        cases.with_page_size(case, 8 if case.name == "joined" else 16),
        marks=() if case.name in ("first_token", "siblings") else pytest.mark.exhaustive,
    )
    for case in cases.CASES
]


def on_hopper() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and backends.target_of(device).compute_capability == (9, 0)


def call(data: cases.CaseData):
    """Update, then attention: (kv_pages, o, lse). Under one jit the interpreter may wait for itself."""
    options = {"backend": backends.GPU_HOPPER, "interpret": not on_hopper()}
    update, attend = (functools.partial(each, **options) for each in (kv_update, paged_attention))
    if on_hopper():
        update, attend = jax.jit(update), jax.jit(attend)
    rest = (cases.on_device(data.plan), jnp.asarray(data.tail_len), jnp.asarray(data.num_queries))
    kv_pages = jax.block_until_ready(update(data.kv_pages, data.k, data.v, *rest))
    return kv_pages, *attend(data.q, kv_pages, *rest)


def check(data: cases.CaseData):
    kv_pages, o, lse = call(data)
    want_o, want_lse = oracle(data)
    assert lse.dtype == jnp.float32
    assert_as_exact_as_dense(o, data, want_o)
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, atol=2e-6, rtol=2e-6)
    for got, want in zip((kv_pages.k, kv_pages.v), updated(data)):
        np.testing.assert_array_equal(np.asarray(got, np.float32), want.astype(np.float32))


@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_matches_the_oracle(case):
    check(cases.build(case, np.random.default_rng(1), jnp.bfloat16))


@pytest.mark.exhaustive
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim):
    """80, with three queries a head, needs its heads padded."""
    case = cases.Case(
        name="heads", head_dim=head_dim, num_heads=3, num_kv_heads=1, segments={"p": 150},
        rows=(cases.Row(segments=("p",), tail_len=9, slot=1), cases.Row(segments=("p",), tail_len=0, slot=0)),
    )  # fmt: skip
    check(cases.build(case, np.random.default_rng(2), jnp.bfloat16))


@pytest.mark.exhaustive
def test_windows_of_many_readers():
    """A run of more than 128 queries, beginning inside a slab of 8."""
    rows = [cases.Row(tail_len=3, slot=0)]
    rows += [cases.Row(segments=("p",), tail_len=i % 5, slot=i + 1) for i in range(35)]
    case = cases.Case(
        name="many", rows=tuple(rows), segments={"p": 40}, num_heads=4, num_kv_heads=1, num_slots=40, head_dim=64
    )
    check(cases.build(case, np.random.default_rng(3), jnp.bfloat16))


@pytest.mark.exhaustive
def test_order_of_rows_does_not_matter():
    case = next(case for case in cases.CASES if case.name == "tree")
    rng = np.random.default_rng(4)
    check(cases.build(cases.shuffled(cases.with_page_size(case, 8), rng), rng, jnp.bfloat16))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_merge_kernel_agrees_with_the_merge_in_xla(head_dim):
    """Rows without partials, with a gap in the list, with partials that saw nothing, with queries of padding."""
    rng = np.random.default_rng(7)
    kv_heads, tokens, group = 2, 2, 2
    partials = np.array([[-1, 3, 0, 7, 9, 11], [-1] * 6, [5, 8, -1, -1, -1, -1], [1, 2, -1, -1, -1, -1]], np.int32)
    num_queries = np.array([2, 2, 1, 2], np.int32)
    shape = (kv_heads, partials.size, tokens * group)
    o, m, l = rng.normal(size=(*shape, head_dim)), rng.normal(size=shape) * 30, rng.uniform(0.5, 9, size=shape)
    for array in (o, m, l):
        array[:, ~np.isin(np.arange(partials.size), partials)] = np.nan
    for empty in (8, 1, 2):  # row 2 has another partial, row 3 sees nothing
        o[:, empty], m[:, empty], l[:, empty] = 0, NEGATIVE, 0
    o, m, l = (array.astype(np.float32) for array in (o, m, l))
    want = merge(o, m, l, partials, num_queries, tokens, jnp.float32)
    stats = np.stack([m, m, l, l], axis=-1).reshape(kv_heads, -1, 4)
    o = o.reshape(kv_heads, -1, head_dim)
    options = {"interpret": None if on_hopper() else interpreter(True)}
    got = gpu_hopper_merge.merge(o, stats, partials, num_queries, tokens, jnp.float32, **options)
    for a, b in zip(got, want):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6, rtol=2e-6)
    assert np.all(np.asarray(got[1])[[1, 3]] == -np.inf) and np.isfinite(got[1][0]).all()


def walk(data: cases.CaseData, rows: int, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel does with the windows, in float64 numpy; then what the merge does."""
    case, plan = data.case, data.plan
    group = case.num_heads // case.num_kv_heads
    queries = case.num_tokens * group

    @jax.jit
    def tell(plan, tail_len, num_queries):
        prepared = prepare(plan, tail_len, num_queries, case.page_size)
        return prepared, *make_windows(prepared, queries, group, rows, tile, case.num_tokens)

    prepared, table, num_windows = tell(cases.on_device(plan), data.tail_len, data.num_queries)
    table = np.asarray(table).reshape(-1, len(WINDOW_FIELDS))
    page_ids, visible = np.asarray(prepared.page_ids), np.asarray(prepared.visible)
    keys, values = (np.asarray(store, np.float64) for store in (data.kv_pages.k, data.kv_pages.v))
    q = np.asarray(data.q, np.float64).reshape(len(case.rows), case.num_tokens, case.num_kv_heads, group, -1)
    q = q.transpose(2, 0, 1, 3, 4).reshape(case.num_kv_heads, -1, case.head_dim)
    shape = (case.num_kv_heads, plan.num_partials * queries)
    total, o, written = np.zeros(shape), np.zeros((*shape, case.head_dim)), np.zeros(shape[1], int)
    step = np.gcd(queries, 8)
    for fields in table[: int(num_windows)]:
        window = dict(zip(WINDOW_FIELDS, (int(field) for field in fields)))
        assert 0 < window["num_live"] <= rows and 0 <= window["num_plain"] <= window["num_tiles"]
        count = window["num_tiles"] * tile
        pages = np.minimum(np.arange(-(-count // case.page_size)), window["num_pages"] - 1) + window["first_page"]
        first = window["first_page"] * case.page_size
        seen = visible[first : first + count]
        plain = seen[: window["num_plain"] * tile]
        assert np.all((plain == 0) | (plain == HIDDEN)), "a plain tile holds a token that only some queries see"
        token = (window["first_query"] + np.arange(window["num_live"])) // group
        mask = seen == 0 if case.num_tokens == 1 else token[:, None] + seen >= 0
        start = window["q_row"] + window["q_copy"] * step
        out = slice(window["out_row"], window["out_row"] + window["num_live"])
        written[out] += 1
        for h in range(case.num_kv_heads):
            own_k, own_v = (store[h, page_ids[pages]].reshape(-1, case.head_dim)[:count] for store in (keys, values))
            scores = q[h, start : start + window["num_live"]] @ own_k.T * case.head_dim**-0.5
            weights = np.where(mask, np.exp(scores), 0)
            total[h, out], o[h, out] = weights.sum(1), weights @ own_v
    assert written.max(initial=0) <= 1, "two windows write one query's partial"
    listed = plan.partials[plan.partials >= 0]
    expected = np.zeros((plan.num_partials, queries), int)
    expected[listed] = 1
    np.testing.assert_array_equal(written, expected.reshape(-1))
    return _merged(case, plan, total, o, data.num_queries)


def _merged(case, plan, total, o, num_queries):
    total = total.reshape(case.num_kv_heads, plan.num_partials, case.num_tokens, -1)
    o = o.reshape(*total.shape, case.head_dim)
    want_o = np.zeros((len(case.rows), case.num_tokens, case.num_heads, case.head_dim))
    lse = np.full(want_o.shape[:3], -np.inf)
    for r, used in enumerate(plan.partials):
        used = used[used >= 0]
        for t in range(num_queries[r]):
            weight, value = total[:, used, t].sum(1).reshape(-1), o[:, used, t].sum(1).reshape(-1, case.head_dim)
            if weight.min() > 0:
                want_o[r, t], lse[r, t] = value / weight[:, None], np.log(weight)
    return want_o, lse


@pytest.mark.parametrize(("rows", "tile"), [(128, 128), (16, 32)])
@pytest.mark.parametrize(("case", "size"), SIZES, ids=lambda value: getattr(value, "name", str(value)))
def test_windows_cover_what_each_query_sees(case, size, rows, tile):
    rng = np.random.default_rng(5)
    case = cases.with_page_size(case, size)
    # The update is a scatter wherever it runs; `interpret` lets it have pages that the attention kernel does not take.
    update = jax.jit(functools.partial(kv_update, backend=backends.GPU_HOPPER, interpret=True))
    for variant in (case, cases.shuffled(case, rng)) if size == 8 else (case,):
        data = cases.build(variant, rng)
        plan = cases.on_device(data.plan)
        kv_pages = update(data.kv_pages, data.k, data.v, plan, data.tail_len, data.num_queries)
        for got, want in zip((kv_pages.k, kv_pages.v), updated(data)):
            np.testing.assert_array_equal(np.asarray(got), want)
        o, lse = walk(dataclasses.replace(data, kv_pages=kv_pages), rows, tile)
        want_o, want_lse = oracle(data)
        np.testing.assert_allclose(o, want_o, atol=2e-6, rtol=2e-6)
        np.testing.assert_allclose(lse, want_lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_update_writes_quantised_pages_like_the_reference(dtype):
    data = cases.build(cases.with_page_size(cases.CASES[-1], 8), np.random.default_rng(6))
    pages = make_kv_pages(data.kv_pages.num_pages, 8, data.case.num_kv_heads, data.case.head_dim, dtype)
    arguments = (data.k, data.v, cases.on_device(data.plan), data.tail_len, data.num_queries)
    got = kv_update(pages, *arguments, backend=backends.GPU_HOPPER, interpret=True)
    want = kv_update(pages, *arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        if a.shape == want.k.shape:
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    for name in ("k_scale", "v_scale"):  # of slots in use; the reference's free ones hold another finite number
        a, b = (np.asarray(getattr(pages, name)) for pages in (got, want))
        used = np.asarray(want.k != 0).any(-1)
        np.testing.assert_array_equal(a[used], b[used])
        assert np.isfinite(a).all()
