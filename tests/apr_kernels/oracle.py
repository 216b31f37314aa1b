"""What attention and update must give, written token by token; shared by the tests of all backends.

The measure of an error is what attention without pages makes in the same precision.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from apr_kernels import cases
from apr_kernels.kv_pages import quantise


def oracle(data: cases.CaseData) -> tuple[np.ndarray, np.ndarray]:
    """(o, lse) of one query, one head, one softmax at a time, in float64."""
    case = data.case
    o = np.zeros(data.q.shape)
    lse = np.full(data.q.shape[:3], -np.inf)
    for r, row in enumerate(case.rows):
        for t in range(row.num_queries if row.slot is not None else 0):
            keys = np.concatenate([data.context[r][0], data.k[r, : t + 1]]).astype(np.float64)
            values = np.concatenate([data.context[r][1], data.v[r, : t + 1]]).astype(np.float64)
            for h in range(case.num_heads):
                kv_head = h * case.num_kv_heads // case.num_heads
                scores = keys[:, kv_head] @ data.q[r, t, h].astype(np.float64) / np.sqrt(case.head_dim)
                top = scores.max()
                weights = np.exp(scores - top)
                lse[r, t, h] = top + np.log(weights.sum())
                o[r, t, h] = weights @ values[:, kv_head] / weights.sum()
    return o, lse


def updated(data: cases.CaseData) -> tuple[np.ndarray, np.ndarray]:
    """What the pages must hold afterwards."""
    size = data.case.page_size
    stores = np.array(data.kv_pages.k), np.array(data.kv_pages.v)
    for store, new in zip(stores, (data.k, data.v)):
        for r, row in enumerate(data.case.rows):
            for t in range(row.num_queries if row.slot is not None else 0):
                page, slot = data.tail_pages[r][(row.tail_len + t) // size], (row.tail_len + t) % size
                if slot == 0:
                    store[:, page] = 0
                store[:, page, slot] = new[r, t]
    return stores


def quantised(data: cases.CaseData, dtype: str) -> tuple[cases.CaseData, cases.CaseData]:
    """The case with quantised pages, and as the oracle is to see it: with every number as it was rounded.

    Scales of unused slots are NaN, and numbers where the dtype has one.
    """

    def numbers(x):
        rounded, scale = quantise(jnp.asarray(x), dtype)
        return np.asarray(rounded.astype(jnp.float32) * scale[..., None])

    stores = {}
    for name in ("k", "v"):
        pages = getattr(data.kv_pages, name)
        unused = jnp.isnan(pages).any(-1)
        stored, scale = quantise(jnp.nan_to_num(pages), dtype)
        if jnp.dtype(dtype) != jnp.int8:
            stored = jnp.where(unused[..., None], jnp.nan, stored)
        stores |= {name: stored, f"{name}_scale": jnp.where(unused, jnp.nan, scale)}
    context = [(numbers(keys), numbers(values)) for keys, values in data.context]
    exact = dataclasses.replace(data, k=numbers(data.k), v=numbers(data.v), context=context)
    return dataclasses.replace(data, kv_pages=dataclasses.replace(data.kv_pages, **stores)), exact


def dense(data: cases.CaseData) -> np.ndarray:
    """Attention of each row over its own gathered context in the precision of `data.q` and of its pages.

    Products of numbers in q's dtype are summed in float32, the softmax is float32, weights and output are rounded to
    q's dtype. Scales of quantised pages are applied to scores and weights.
    """
    case, rows = data.case, range(len(data.case.rows))
    num_old = [len(data.context[r][0]) for r in rows]
    visible = np.zeros((len(rows), 1, case.num_tokens, 1, max(num_old) + case.num_tokens), bool)
    for r, row in enumerate(case.rows):
        for t in range(row.num_queries if row.slot is not None else 0):
            visible[r, 0, t, 0, : num_old[r] + t + 1] = True
    padded = []
    for i, new in enumerate((data.k, data.v)):
        x = np.zeros((len(rows), visible.shape[-1], *new.shape[2:]), new.dtype)
        for r in rows:
            x[r, : num_old[r]], x[r, num_old[r] : num_old[r] + case.num_tokens] = data.context[r][i], new[r]
        padded.append(jnp.asarray(x))
    stored = None if data.kv_pages.k_scale is None else data.kv_pages.k.dtype
    return np.asarray(_attention(jnp.asarray(data.q), *padded, jnp.asarray(visible), stored), np.float64)


@functools.partial(jax.jit, static_argnums=4)
def _attention(q, k, v, visible, stored):
    """q: [R, T, H, D]. k, v: [R, N, K, D]. visible: [R, 1, T, 1, N]. stored: dtype of quantised pages, or None."""
    dtype, options = q.dtype, {"preferred_element_type": jnp.float32, "precision": "highest"}
    k_scale = v_scale = jnp.ones(())
    if stored is not None:
        (k, k_scale), (v, v_scale) = quantise(k, stored), quantise(v, stored)
        k, v = k.astype(dtype), v.astype(dtype)
        k_scale, v_scale = (scale.transpose(0, 2, 1)[:, :, None, None] for scale in (k_scale, v_scale))
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("rtkgd,rnkd->rktgn", grouped, k, **options) * k_scale * q.shape[-1] ** -0.5
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jnp.where(visible, jnp.exp(scores - jnp.maximum(scores.max(-1, keepdims=True), -1e30)), 0)
    out = jnp.einsum("rktgn,rnkd->rktgd", (weights * v_scale).astype(dtype), v, **options)
    out = out / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return out.astype(dtype).transpose(0, 2, 1, 3, 4).reshape(q.shape)


def assert_as_exact_as_dense(o, data: cases.CaseData, want: np.ndarray) -> None:
    """The largest error of o, and its root mean square, are at most twice those of `dense`; `want` is the oracle's."""
    assert o.dtype == data.q.dtype
    errors = [np.abs(np.asarray(got, np.float64) - want) for got in (o, dense(data))]
    for name, size in (("largest", np.max), ("root mean square", lambda x: np.sqrt((x**2).mean()))):
        error, measure = map(size, errors)
        assert error <= 2 * measure, (
            f"the {name} error, {error:.3g}, is more than twice dense attention's {measure:.3g}"
        )
