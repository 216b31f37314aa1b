"""The TPU's kernels in interpret mode, against the float64 oracle. All that is unused holds NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apr_kernels import cases
from apr_kernels.backends import TPU, format_for
from apr_kernels.kv_pages import HEAD_MAJOR, convert_pages
from apr_kernels.kv_update import kv_update
from apr_kernels.paged_attention import paged_attention, tuning
from jax.experimental.pallas import tpu as pltpu

from tests.apr_kernels.oracle import assert_as_exact_as_dense, oracle, quantised, updated

BY_NAME = {case.name: case for case in cases.CASES}
QUICK = ("only_padding", "siblings", "joined", "prefill")  # each takes seconds to compile; the others run as slow


def slow(value):
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def quick(values, chosen):
    """Parameters, all but the chosen ones marked slow."""
    return [value if value in chosen else slow(value) for value in values]


# Many windows of queries; grid steps of some heads; blocks of one page; a ring of two.
SMALL_BLOCKS = tuning.TpuBlocks(heads=1, window=128, block_pages=1, buffers=2)
LONG = cases.Case(  # more items than one chunk of page ids holds, and a block and a half on their way
    name="long",
    segments={"p": 5_300, "q": 130},
    page_size=8,
    item_pages=16,
    num_heads=2,
    num_kv_heads=1,
    rows=(
        cases.Row(segments=("p",), tail_len=3, slot=1),
        cases.Row(segments=("p", "q"), tail_len=200, slot=5),
        cases.Row(segments=("q",), tail_len=0, slot=0),
    ),
)
WINDOWS = cases.Case(  # rows of 3 * 50 queries that share no border with windows of 128
    name="windows",
    segments={"p": 40, "q": 23},
    num_tokens=50,
    num_heads=6,
    head_dim=64,
    rows=tuple(
        cases.Row(segments=names, tail_len=tail, num_queries=queries, slot=i)
        for i, (names, tail, queries) in enumerate(
            ((("p",), 0, 50), (("p", "q"), 30, 41), (("q",), 7, 0), ((), 70, 50))
        )
    ),
)


@functools.partial(jax.jit, static_argnames="interpret")
def step(kv_pages, q, k, v, plan, tail_len, num_queries, interpret):
    """Update, then attention, as the engine does."""
    options = {"backend": TPU, "interpret": interpret}
    kv_pages = kv_update(kv_pages, k, v, plan, tail_len, num_queries, **options)
    return kv_pages, *paged_attention(q, kv_pages, plan, tail_len, num_queries, **options)


def on_tpu() -> bool:
    return jax.devices()[0].platform == "tpu"


def call(data: cases.CaseData, interpret=None):
    """Returns (kv_pages in the reference's format, o, lse). Interpreted, unless there is a TPU."""
    interpret = not on_tpu() if interpret is None else interpret
    kv_pages = convert_pages(data.kv_pages, format_for(TPU, data.case.head_dim))
    plan = cases.on_device(data.plan)
    kv_pages, o, lse = step(kv_pages, data.q, data.k, data.v, plan, data.tail_len, data.num_queries, interpret)
    return convert_pages(kv_pages, HEAD_MAJOR), o, lse


def check(data: cases.CaseData, interpret=None):
    kv_pages, o, lse = call(data, interpret)
    want_o, want_lse = oracle(data)
    assert_as_exact_as_dense(o, data, want_o)
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, atol=2e-6, rtol=2e-6)
    for got, want in zip((kv_pages.k, kv_pages.v), updated(data)):
        np.testing.assert_array_equal(np.asarray(got, np.float32), want.astype(np.float32))


@pytest.mark.parametrize("name", quick(BY_NAME, QUICK))
def test_matches_the_oracle(name):
    check(cases.build(BY_NAME[name], np.random.default_rng(1)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("page_size", [8, 32, 64, 128])
@pytest.mark.parametrize("name", ["joined", "prefill"])
def test_page_sizes(name, page_size):
    check(cases.build(cases.with_page_size(BY_NAME[name], page_size), np.random.default_rng(2)))


@pytest.mark.parametrize("head_dim", quick([64, 80, 96, 128, 256], [64, 96]))
def test_head_dims(head_dim):
    case = dataclasses.replace(BY_NAME["tree"], head_dim=head_dim)
    check(cases.build(case, np.random.default_rng(3)))


@pytest.mark.parametrize("name", quick(["tree", "joined"], ["tree"]))
def test_order_of_rows_does_not_matter(name):
    rng = np.random.default_rng(4)
    check(cases.build(cases.shuffled(BY_NAME[name], rng), rng))


@pytest.mark.parametrize("case", quick([LONG, WINDOWS, BY_NAME["joined"]], [WINDOWS]), ids=lambda case: case.name)
def test_small_blocks(case, monkeypatch):
    monkeypatch.setattr(tuning, "tpu_blocks", lambda *_, **__: SMALL_BLOCKS)
    step.clear_cache()
    check(cases.build(case, np.random.default_rng(5)))
    step.clear_cache()


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [LONG, WINDOWS], ids=lambda case: case.name)
def test_usual_blocks(case):
    check(cases.build(case, np.random.default_rng(6)))


@pytest.mark.parametrize(
    ("name", "page_size"),
    quick([*((name, 16) for name in BY_NAME), ("joined", 8), ("prefill", 8)], [("joined", 8)]),
)
def test_bfloat16(name, page_size):
    check(cases.build(cases.with_page_size(BY_NAME[name], page_size), np.random.default_rng(7), jnp.bfloat16))


@pytest.mark.parametrize(
    ("name", "page_size", "dtype"),
    quick(
        [
            (name, page_size, dtype)
            for name, page_size in (*((name, 16) for name in BY_NAME), ("joined", 8), ("tree", 64))
            for dtype in ("int8", "float8_e4m3fn")
        ],
        [("joined", 8, "int8"), ("prefill", 16, "float8_e4m3fn")],
    ),
)
def test_quantised(name, page_size, dtype):
    case = cases.with_page_size(BY_NAME[name], page_size)
    data, exact = quantised(cases.build(case, np.random.default_rng(8)), dtype)
    kv_pages, o, lse = call(data)
    want_o, want_lse = oracle(exact)
    assert_as_exact_as_dense(o, data, want_o)
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, atol=2e-6, rtol=2e-6)
    plan = cases.on_device(data.plan)
    want = jax.jit(kv_update)(data.kv_pages, data.k, data.v, plan, data.tail_len, data.num_queries)
    for name in ("k", "v", "k_scale", "v_scale"):
        got = np.asarray(getattr(kv_pages, name), np.float32)
        np.testing.assert_array_equal(got, np.asarray(getattr(want, name), np.float32), err_msg=name)


RACES = [(name, small) for name in ("siblings", "prefill") for small in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "small"), quick(RACES, [("siblings", True), ("prefill", True)]))
def test_no_races(name, small, monkeypatch):
    """Uninitialised memory reads as NaN here, and copies are made as late as they may be."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the only place where races are told

    if small:
        monkeypatch.setattr(tuning, "tpu_blocks", lambda *_, **__: SMALL_BLOCKS)
    step.clear_cache()
    check(cases.build(BY_NAME[name], np.random.default_rng(9)), interpret=pltpu.InterpretParams(detect_races=True))
    step.clear_cache()
    assert not interpret_pallas_call.races.races_found


def test_a_token_without_a_page_is_dropped():
    data = cases.build(BY_NAME["siblings"], np.random.default_rng(10))
    kv_pages = convert_pages(data.kv_pages, format_for(TPU, data.case.head_dim))
    no_pages = dataclasses.replace(data.plan, tail_pages=np.zeros_like(data.plan.tail_pages))
    options = {"backend": TPU, "interpret": not on_tpu()}
    after = kv_update(kv_pages, data.k, data.v, no_pages, data.tail_len, data.num_queries, **options)
    np.testing.assert_array_equal(np.asarray(after.k), np.asarray(kv_pages.k))
    np.testing.assert_array_equal(np.asarray(after.v), np.asarray(kv_pages.v))


@pytest.mark.parametrize("num_tokens", [1, 2048])
@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
@pytest.mark.parametrize("cores", [1, 2])
def test_block_sizes_fit(num_tokens, num_kv_heads, cores):
    for page_size in tuning.PAGE_SIZES:
        for rows in (1, 64, 256):
            blocks = tuning.tpu_blocks(
                num_kv_heads, rows * num_tokens * 8, num_tokens, 16, page_size, 2048, 6144, cores
            )
            assert num_kv_heads % blocks.heads == 0 and 16 % blocks.block_pages == 0 and blocks.window % 128 == 0
            pages = blocks.buffers * blocks.block_pages * page_size * 2048
            assert blocks.heads * (pages + blocks.window * 6144) <= tuning.TPU_VMEM
            assert num_kv_heads == 1 or blocks.heads * cores <= num_kv_heads
