"""Plain jax.numpy write of new keys and values, whole pages at a time.

Letters: R rows, T tokens a row, J pages that T tokens may touch, K KV heads, N pages, P positions a page, D
head dim.
"""

import dataclasses

import jax.numpy as jnp

from apr_kernels.kv_pages import NULL_PAGE, KVPages
from apr_kernels.plan import Plan


def kv_update(kv_pages: KVPages, k, v, plan: Plan, tail_len, num_queries) -> KVPages:
    """See `apr_kernels.kv_update.api.kv_update`.

    The touched pages are read, changed and written back whole, which makes zeroing a fresh page's other slots
    part of the same write. Page sets of rows are disjoint, so the scatter's order does not matter.
    """
    num_rows, num_tokens = k.shape[:2]
    page_size = kv_pages.page_size
    touched = 1 if num_tokens == 1 else (num_tokens + page_size - 2) // page_size + 1  # J
    start = tail_len.at[plan.row_slot].get(mode="fill", fill_value=0)  # [R]
    page_idx = start[:, None] // page_size + jnp.arange(touched)  # [R, J]
    token = page_idx[..., None] * page_size + jnp.arange(page_size) - start[:, None, None]  # [R, J, P] index in T
    is_new = (token >= 0) & (token < num_queries[:, None, None])
    page_ids = plan.tail_pages.at[plan.row_slot[:, None], page_idx].get(mode="fill", fill_value=NULL_PAGE)
    writes = is_new.any(-1) & (page_ids != NULL_PAGE)
    page_ids = jnp.where(writes, page_ids, kv_pages.num_pages).reshape(-1)  # out of range: dropped
    is_fresh = is_new[..., :1]  # the page's first slot is written: its other slots become zero

    def write(pages, new):
        new = jnp.moveaxis(new, 2, 0).astype(pages.dtype)  # [K, R, T, D]
        if num_tokens == 1:
            new = new[:, :, :, None, :]  # [K, R, J = 1, P (broadcast), D]
        else:
            index = jnp.clip(token, 0, num_tokens - 1).reshape(num_rows, -1)
            new = jnp.take_along_axis(new, index[None, :, :, None], axis=2)
            new = new.reshape(-1, num_rows, touched, page_size, kv_pages.head_dim)
        old = jnp.take(pages, page_ids, axis=1, mode="clip").reshape(
            -1, num_rows, touched, page_size, kv_pages.head_dim
        )
        old = jnp.where(is_fresh[None, ..., None], 0, old)
        merged = jnp.where(is_new[None, ..., None], new, old)
        merged = merged.reshape(-1, num_rows * touched, page_size, kv_pages.head_dim)
        return pages.at[:, page_ids].set(merged, mode="drop")

    return dataclasses.replace(kv_pages, k=write(kv_pages.k, k), v=write(kv_pages.v, v))
