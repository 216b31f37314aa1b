"""Attention and update of the reference against the float64 oracle. All that is unused holds NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apr_kernels import cases
from apr_kernels.kv_update import kv_update
from apr_kernels.paged_attention import paged_attention
from apr_kernels.paged_attention import reference as attention_reference
from jax.extend.core import jaxprs_in_params

from tests.apr_kernels.oracle import assert_as_exact_as_dense, oracle, quantised, updated

ALL = [
    cases.with_page_size(case, size)
    for case in cases.CASES
    for size in ((1, 8, 16, 64) if case.name in ("joined", "prefill") else (16,))
]
QUICK = ("tree_page16", "joined_page16", "prefill_page16")
SOME = [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.exhaustive) for case in ALL]


@jax.jit
def step(kv_pages, q, k, v, plan, tail_len, num_queries):
    """Update, then attention, as the engine does."""
    kv_pages = kv_update(kv_pages, k, v, plan, tail_len, num_queries)
    return kv_pages, *paged_attention(q, kv_pages, plan, tail_len, num_queries)


def call(data: cases.CaseData):
    """Returns (kv_pages, o, lse)."""
    plan = cases.on_device(data.plan)
    return step(data.kv_pages, data.q, data.k, data.v, plan, data.tail_len, data.num_queries)


def check(data: cases.CaseData):
    kv_pages, o, lse = call(data)
    want_o, want_lse = oracle(data)
    assert_as_exact_as_dense(o, data, want_o)
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, atol=2e-6, rtol=2e-6)
    for got, want in zip((kv_pages.k, kv_pages.v), updated(data)):
        np.testing.assert_array_equal(np.asarray(got, np.float32), want.astype(np.float32))


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_matches_the_oracle(case):
    check(cases.build(case, np.random.default_rng(1)))


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_bfloat16(case):
    check(cases.build(case, np.random.default_rng(3), jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_quantised(case, dtype):
    data, exact = quantised(cases.build(case, np.random.default_rng(3), jnp.bfloat16), dtype)
    _, o, lse = call(data)
    want_o, want_lse = oracle(exact)
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert_as_exact_as_dense(o, data, want_o)
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["tree", "joined"])
def test_order_of_rows_does_not_matter(name, seed):
    case = next(case for case in cases.CASES if case.name == name)
    rng = np.random.default_rng(seed)
    check(cases.build(cases.shuffled(cases.with_page_size(case, 8), rng), rng))


@pytest.mark.parametrize("name", ["tree", "prefill"])
def test_float64(name):
    case = next(case for case in cases.CASES if case.name == name)
    with jax.enable_x64(True):
        data = cases.build(case, np.random.default_rng(2), np.float64)
        kv_pages, o, lse = call(data)
        want_o, want_lse = oracle(data)
        assert o.dtype == lse.dtype == jnp.float64
        np.testing.assert_allclose(o, want_o, atol=1e-13, rtol=1e-13)
        np.testing.assert_allclose(lse, want_lse, atol=1e-13, rtol=1e-13)
        for got, want in zip((kv_pages.k, kv_pages.v), updated(data)):
            np.testing.assert_array_equal(np.asarray(got), want)


def test_large_scores_do_not_overflow():
    data = cases.build(cases.CASES[4], np.random.default_rng(4))
    data = dataclasses.replace(data, q=data.q * 1000)
    _, o, lse = call(data)
    want_o, want_lse = oracle(data)
    np.testing.assert_allclose(np.asarray(lse), want_lse, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(o), want_o, atol=2e-3)


def test_a_shared_item_is_gathered_once_for_all_rows():
    """No intermediate of the shared loop grows with rows times tokens times head_dim."""
    case = cases.Case(
        name="wide",
        segments={"p": 256},
        item_pages=16,
        num_slots=16,
        head_dim=64,
        rows=tuple(cases.Row(segments=("p",), tail_len=1, slot=i) for i in range(16)),
    )
    data = cases.build(case, np.random.default_rng(5))
    plan = cases.on_device(data.plan)
    jaxpr = jax.make_jaxpr(paged_attention)(data.q, data.kv_pages, plan, data.tail_len, data.num_queries)
    item = case.item_pages * case.page_size * case.num_kv_heads * case.head_dim
    chunk = 2 * len(case.rows) * attention_reference.CHUNK_TOKENS * case.num_kv_heads * case.head_dim
    largest = max(var.aval.size for eqn in equations(jaxpr.jaxpr) for var in eqn.outvars if hasattr(var.aval, "size"))
    assert largest <= max(item, chunk, data.kv_pages.k.size)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from equations(sub)


def test_the_update_is_in_place():
    data = cases.build(cases.CASES[3], np.random.default_rng(6))
    plan = cases.on_device(data.plan)
    compiled = (
        jax.jit(kv_update, donate_argnums=0)
        .lower(data.kv_pages, data.k, data.v, plan, data.tail_len, data.num_queries)
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == data.kv_pages.bytes
    assert memory.temp_size_in_bytes < data.kv_pages.bytes


def test_a_token_without_a_page_is_dropped():
    data = cases.build(cases.CASES[3], np.random.default_rng(7))
    no_pages = dataclasses.replace(data.plan, tail_pages=np.zeros_like(data.plan.tail_pages))
    after = kv_update(data.kv_pages, data.k, data.v, cases.on_device(no_pages), data.tail_len, data.num_queries)
    np.testing.assert_array_equal(np.asarray(after.k), np.asarray(data.kv_pages.k))
    np.testing.assert_array_equal(np.asarray(after.v), np.asarray(data.kv_pages.v))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": np.zeros((5, 1, 4, 8), np.float32)}, r"must be \[R, T, H, 16\]"),
        ({"q": np.zeros((5, 1, 3, 16), np.float32)}, "3 heads, must be a multiple of 2"),
        ({"q": np.zeros((5, 1, 4, 16), np.int32)}, "dtype int32"),
        ({"q": np.zeros((4, 1, 4, 16), np.float32)}, "4 rows given, the plan has 5"),
        ({"tail_len": np.zeros(3, np.int32)}, "tail_len is"),
        ({"num_queries": np.zeros(5, np.float32)}, "num_queries is"),
    ],
)
def test_refuses_what_does_not_fit(change, words):
    data = dataclasses.replace(cases.build(cases.CASES[3], np.random.default_rng(8)), **change)
    with pytest.raises(ValueError, match=words):
        paged_attention(data.q, data.kv_pages, data.plan, data.tail_len, data.num_queries)


def test_pages_that_a_backend_does_not_support_are_refused_unless_interpreted():
    data = cases.build(cases.CASES[3], np.random.default_rng(8))
    with pytest.raises(ValueError, match="backend 'gpu_triton': head_dim 16, must be one of 64, 80, 96, 128, 256"):
        paged_attention(data.q, data.kv_pages, data.plan, data.tail_len, data.num_queries, backend="gpu_triton")


def test_update_refuses_what_does_not_fit():
    data = cases.build(cases.CASES[3], np.random.default_rng(9))
    with pytest.raises(ValueError, match="k has shape"):
        kv_update(data.kv_pages, data.k[..., :8], data.v, data.plan, data.tail_len, data.num_queries)
