"""The Triton kernel, interpreted here and native on an NVIDIA GPU, against the float64 oracle and a dense reference.

The interpreter takes seconds a case, so most are slow.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apr_kernels import backends, cases
from apr_kernels.kv_pages import is_quantised
from apr_kernels.kv_update import kv_update
from apr_kernels.paged_attention import paged_attention
from apr_kernels.plan import validate_plan

from tests.apr_kernels.oracle import assert_as_exact_as_dense, oracle, quantised, updated

FAST = {
    ("joined_page8", "float32"), ("prefill_page8", "float32"),
    ("tree_page16", "bfloat16"), ("joined_page16", "int8"), ("siblings_page16", "float8_e4m3fn"),
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
ALL = [
    pytest.param(case, dtype, marks=() if (case.name, dtype) in FAST else pytest.mark.exhaustive)
    for case in (
        cases.with_page_size(case, size)
        for case in cases.CASES
        for size in ((8, 16, 64) if case.name in ("joined", "prefill") else (16,))
    )
    for dtype in DTYPES
]


def on_gpu() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and backends.target_of(device).compute_capability >= (8, 0)


def build(case: cases.Case, rng: np.random.Generator, dtype: str) -> tuple[cases.CaseData, cases.CaseData]:
    """The data to call with, and those that the oracle reads: quantised numbers as what they stand for."""
    data = cases.build(case, rng, jnp.bfloat16 if dtype != "float32" else np.float32)
    return quantised(data, dtype) if is_quantised(dtype) else (data, data)


def call(data: cases.CaseData):
    """Update, then attention: (kv_pages, o, lse)."""

    @jax.jit
    def step(kv_pages, q, k, v, plan, tail_len, num_queries):
        options = {"backend": backends.GPU_TRITON, "interpret": not on_gpu()}
        kv_pages = kv_update(kv_pages, k, v, plan, tail_len, num_queries, **options)
        return kv_pages, *paged_attention(q, kv_pages, plan, tail_len, num_queries, **options)

    arrays = (data.q, data.k, data.v, cases.on_device(data.plan), data.tail_len, data.num_queries)
    return step(data.kv_pages, *arrays)


def check(data: cases.CaseData, read: cases.CaseData):
    kv_pages, o, lse = call(data)
    want_o, want_lse = oracle(read)
    assert lse.dtype == jnp.float32
    assert_as_exact_as_dense(o, data, want_o)
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, atol=2e-6, rtol=2e-6)
    if data is read:
        for got, want in zip((kv_pages.k, kv_pages.v), updated(data)):
            np.testing.assert_array_equal(np.asarray(got, np.float32), want.astype(np.float32))


@pytest.mark.parametrize(("case", "dtype"), ALL, ids=lambda value: getattr(value, "name", value))
def test_matches_the_oracle(case, dtype):
    check(*build(case, np.random.default_rng(1), dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("head_dim", [80, *(pytest.param(d, marks=pytest.mark.exhaustive) for d in (64, 96, 128, 256))])
def test_head_dims(head_dim, dtype):
    case = cases.Case(
        name="heads", head_dim=head_dim, num_heads=3, num_kv_heads=1, segments={"p": 150},
        rows=(cases.Row(segments=("p",), tail_len=9, slot=1), cases.Row(segments=("p",), tail_len=0, slot=0)),
    )  # fmt: skip
    check(*build(case, np.random.default_rng(2), dtype))


@pytest.mark.parametrize("num_kv_heads", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_windows_of_many_readers(num_kv_heads):
    """More queries than a window has, and narrow runs beside them."""
    rows = [cases.Row(tail_len=3, slot=0)]
    rows += [cases.Row(segments=("p",), tail_len=i % 5, slot=i + 1) for i in range(70)]
    case = cases.Case(
        name="many", rows=tuple(rows), segments={"p": 40}, num_heads=4, num_kv_heads=num_kv_heads, num_slots=72,
        head_dim=32,
    )  # fmt: skip
    check(*build(case, np.random.default_rng(3), "bfloat16"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tree", "joined"])
def test_order_of_rows_does_not_matter(name, dtype):
    case = next(case for case in cases.CASES if case.name == name)
    rng = np.random.default_rng(4)
    check(*build(cases.shuffled(cases.with_page_size(case, 8), rng), rng, dtype))


@pytest.mark.parametrize("tail_last", [True, False])
def test_a_run_of_segments_and_tail(tail_last):
    """All that only one row reads is one run. Early queries stop short of a tail at its end, not of one before."""
    case = cases.Case(
        name="own", page_size=8, num_tokens=40, segments={"p": 21, "a": 11, "b": 3},
        rows=(
            cases.Row(segments=("p", "a"), tail_len=5, num_queries=40, slot=3),
            cases.Row(segments=("p", "b"), tail_len=0, num_queries=33, slot=1),
        ),
    )  # fmt: skip
    data = cases.build(case, np.random.default_rng(5))
    data = dataclasses.replace(data, plan=one_run_a_row(data.plan, tail_last))
    validate_plan(data.plan, num_pages=data.kv_pages.num_pages, page_size=case.page_size)
    check(data, data)


def one_run_a_row(plan, tail_last: bool):
    """The plan with each row's private items put together."""
    used = [w for w in range(plan.num_shared, plan.num_items) if plan.rows[w, 1] > plan.rows[w, 0]]
    used.sort(key=lambda w: (plan.rows[w, 0], (plan.tail_slot[w] >= 0) == tail_last))
    order = np.r_[: plan.num_shared, used, [w for w in range(plan.num_shared, plan.num_items) if w not in used]]
    names = ("pages", "fills", "rows", "tail_slot", "tail_offset", "partial_start")
    plan = dataclasses.replace(plan, **{name: getattr(plan, name)[order] for name in names})
    partials = np.full_like(plan.partials, -1)
    for row in range(plan.num_rows):
        own = [w for w in range(plan.num_shared, plan.num_items) if tuple(plan.rows[w]) == (row, row + 1)]
        shared = {int(plan.partial_start[w] + row - plan.rows[w, 0]) for w in range(plan.num_shared)
                  if plan.rows[w, 0] <= row < plan.rows[w, 1]}  # fmt: skip
        plan.partial_start[own] = plan.partial_start[own].min()
        listed = sorted(shared | set(plan.partial_start[own].tolist()))
        partials[row, : len(listed)] = listed
    return dataclasses.replace(plan, partials=partials)
