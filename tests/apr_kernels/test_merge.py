"""The merge of partial results against a sum written query by query in float64. What no row lists holds NaN."""

import functools

import jax
import numpy as np
import pytest
from apr_kernels.paged_attention import gpu_merge
from apr_kernels.paged_attention.merge import merge

MERGES = {"xla": merge, "gpu": functools.partial(gpu_merge.merge, interpret=True)}


def make_partials(
    rng: np.random.Generator, *, num_rows: int, num_tokens: int, group: int, most: int, empty: float, head_dim: int = 16
):
    """Random partials, a few of each row listed, in no order and with gaps; a share `empty` of queries saw none."""
    num_kv_heads = 2
    total = num_rows * most + 3
    queries = num_tokens * group
    o = np.full((num_kv_heads, total, queries, head_dim), np.nan, np.float32)
    m, l = (np.full(o.shape[:3], np.nan, np.float32) for _ in range(2))
    partials = np.full((num_rows, most), -1, np.int32)
    free = rng.permutation(total)
    for row in range(num_rows):
        count = min(row, most)  # row 0 has none
        places, free = free[:count], free[count:]
        partials[row, rng.permutation(most)[:count]] = places
        saw = rng.random((num_kv_heads, count, queries)) >= empty
        m[:, places] = np.where(saw, rng.normal(size=saw.shape) * 30, -1e30 if row % 2 else -np.inf)
        l[:, places] = np.where(saw, rng.uniform(1, 50, size=saw.shape), 0)
        o[:, places] = np.where(saw[..., None], rng.normal(size=(*saw.shape, head_dim)) * l[:, places][..., None], 0)
    return o, m, l, partials, rng.integers(0, num_tokens + 1, num_rows).astype(np.int32)


def brute_force(o, m, l, partials, num_queries, num_tokens: int):
    num_kv_heads, _, queries, head_dim = o.shape
    group = queries // num_tokens
    o, m, l = (part.astype(np.float64) for part in (o, m, l))
    merged = np.zeros((len(partials), num_tokens, num_kv_heads * group, head_dim))
    lse = np.full(merged.shape[:3], -np.inf)
    for row, token, head in np.ndindex(lse.shape):
        at = (head // group, partials[row][partials[row] >= 0], token * group + head % group)
        seen = l[at] > 0
        if token >= num_queries[row] or not seen.any():
            continue
        top = m[at][seen].max()
        factor = np.exp(m[at][seen] - top)
        total = (factor * l[at][seen]).sum()
        merged[row, token, head] = factor @ o[at][seen] / total
        lse[row, token, head] = top + np.log(total)
    return merged, lse


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("num_tokens", "group"), [(1, 4), (3, 1), (5, 2)])
def test_matches_a_brute_force(num_tokens, group, empty, name):
    rng = np.random.default_rng(num_tokens)
    arrays = make_partials(rng, num_rows=7, num_tokens=num_tokens, group=group, most=5, head_dim=24, empty=empty)
    o, lse = jax.jit(MERGES[name], static_argnums=(5, 6))(*arrays, num_tokens, np.float32)
    want_o, want_lse = brute_force(*arrays, num_tokens)
    np.testing.assert_allclose(np.asarray(o), want_o, atol=2e-6, rtol=2e-6)
    np.testing.assert_allclose(np.asarray(lse), want_lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", MERGES)
def test_the_order_in_which_a_row_lists_them_does_not_matter(name):
    arrays = make_partials(np.random.default_rng(9), num_rows=6, num_tokens=2, group=2, most=4, empty=0.2)
    o, m, l, partials, num_queries = arrays
    first, second = (
        jax.jit(MERGES[name], static_argnums=(5, 6))(o, m, l, listed, num_queries, 2, np.float32)
        for listed in (partials, partials[:, ::-1].copy())
    )
    for a, b in zip(first, second):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", MERGES)
def test_the_result_has_the_dtype_asked_for(name):
    arrays = make_partials(np.random.default_rng(9), num_rows=3, num_tokens=1, group=2, most=2, empty=0.0)
    o, lse = MERGES[name](*arrays, 1, jax.numpy.bfloat16)
    assert o.dtype == jax.numpy.bfloat16 and lse.dtype == np.float32
