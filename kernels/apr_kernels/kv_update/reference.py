"""Plain jax.numpy write of new keys and values.

Letters: R rows, T tokens a row, J pages that T tokens may touch, K KV heads, N pages, P positions a page, D
head dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from apr_kernels.kv_pages import NULL_PAGE, KVPages
from apr_kernels.plan import Plan


class Prepared(NamedTuple):
    """Where a step's tokens go.

    Attributes:
      page_ids: [R, J] the pages touched; out of range (and dropped by a scatter) where nothing is written.
      token: [R, J, P] index among the row's T tokens of what goes into each slot.
      is_new: [R, J, P] whether anything does.
      any_fresh: [] whether the first slot of some page is written: its other slots become zero.
    """

    page_ids: jax.Array
    token: jax.Array
    is_new: jax.Array
    any_fresh: jax.Array


def prepare(plan: Plan, tail_len, num_queries, num_tokens: int, page_size: int, num_pages: int) -> Prepared:
    """See `apr_kernels.kv_update.api.prepare`."""
    touched = 1 if num_tokens == 1 else (num_tokens + page_size - 2) // page_size + 1  # J
    start = tail_len.at[plan.row_slot].get(mode="fill", fill_value=0)  # [R]
    page_idx = start[:, None] // page_size + jnp.arange(touched)  # [R, J]
    token = page_idx[..., None] * page_size + jnp.arange(page_size) - start[:, None, None]
    is_new = (token >= 0) & (token < num_queries[:, None, None])
    page_ids = plan.tail_pages.at[plan.row_slot[:, None], page_idx].get(mode="fill", fill_value=NULL_PAGE)
    writes = is_new.any(-1) & (page_ids != NULL_PAGE)
    is_new &= writes[..., None]
    return Prepared(jnp.where(writes, page_ids, num_pages), token, is_new, is_new[..., 0].any())


def kv_update(kv_pages: KVPages, k, v, prepared: Prepared) -> KVPages:
    """See `apr_kernels.kv_update.api.kv_update`. Rows write to disjoint pages: a scatter's order does not matter."""
    write = _write_tokens if k.shape[1] == 1 else _write_pages
    return dataclasses.replace(kv_pages, k=write(kv_pages.k, k, prepared), v=write(kv_pages.v, v, prepared))


def _write_tokens(pages, new, prepared: Prepared):
    """Scatters one token a row, after zeroing the pages that are begun with it."""
    page_ids, slot = prepared.page_ids[:, 0], jnp.argmax(prepared.is_new[:, 0], axis=-1)

    def zero(pages):
        fresh = jnp.where(prepared.is_new[:, 0, 0], page_ids, pages.shape[1])
        return pages.at[:, fresh].set(0, mode="drop")

    pages = lax.cond(prepared.any_fresh, zero, lambda pages: pages, pages)
    return pages.at[:, page_ids, slot].set(jnp.moveaxis(new[:, 0], 1, 0).astype(pages.dtype), mode="drop")


def _write_pages(pages, new, prepared: Prepared):
    """Reads the touched pages, changes and writes them back whole."""
    page_size, head_dim = pages.shape[2:]
    num_rows, num_tokens = new.shape[:2]
    touched = prepared.page_ids.shape[1]
    page_ids = prepared.page_ids.reshape(-1)
    new = jnp.moveaxis(new, 2, 0).astype(pages.dtype)  # [K, R, T, D]
    index = jnp.clip(prepared.token, 0, num_tokens - 1).reshape(num_rows, -1)
    new = jnp.take_along_axis(new, index[None, :, :, None], axis=2).reshape(-1, num_rows, touched, page_size, head_dim)
    old = jnp.take(pages, page_ids, axis=1, mode="clip").reshape(-1, num_rows, touched, page_size, head_dim)
    old = jnp.where(prepared.is_new[None, ..., :1, None], 0, old)  # a page that is begun
    merged = jnp.where(prepared.is_new[None, ..., None], new, old)
    return pages.at[:, page_ids].set(merged.reshape(-1, num_rows * touched, page_size, head_dim), mode="drop")
