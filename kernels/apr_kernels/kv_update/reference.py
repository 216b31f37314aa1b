"""Plain jax.numpy write of new keys and values.

Letters: R rows, T tokens a row, J pages that T tokens may touch, K KV heads, N pages, P positions a page, D
head dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from apr_kernels.kv_pages import NULL_PAGE, KVPages, is_quantised, quantise
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
    new: dict[str, jax.Array] = {"k": k, "v": v}
    if is_quantised(kv_pages.dtype):
        for name in ("k", "v"):
            new[name], new[f"{name}_scale"] = quantise(new[name], kv_pages.dtype)
    written = {name: write(getattr(kv_pages, name), each, prepared) for name, each in new.items()}
    return dataclasses.replace(kv_pages, **written)


def _write_tokens(pages, new, prepared: Prepared):
    """Scatters one token a row, new: [R, 1, K, ...], after zeroing the pages: [K, N, P, ...] begun with it."""
    page_ids, slot = prepared.page_ids[:, 0], jnp.argmax(prepared.is_new[:, 0], axis=-1)

    def zero(pages):
        fresh = jnp.where(prepared.is_new[:, 0, 0], page_ids, pages.shape[1])
        return pages.at[:, fresh].set(0, mode="drop")

    pages = lax.cond(prepared.any_fresh, zero, lambda pages: pages, pages)
    return pages.at[:, page_ids, slot].set(jnp.moveaxis(new[:, 0], 1, 0).astype(pages.dtype), mode="drop")


def _write_pages(pages, new, prepared: Prepared):
    """Reads the touched pages: [K, N, P, ...], changes them to new: [R, T, K, ...] and writes them back whole."""
    num_rows, num_tokens = new.shape[:2]
    page_ids = prepared.page_ids.reshape(-1)
    index = jnp.clip(prepared.token, 0, num_tokens - 1)  # [R, J, P]
    new = new.astype(pages.dtype)[jnp.arange(num_rows)[:, None, None], index]  # [R, J, P, K, ...]
    new = jnp.moveaxis(new, 3, 0).reshape(new.shape[3], len(page_ids), *new.shape[2:3], *new.shape[4:])

    def mask(where):
        """[R, J, P or 1], for arrays [K, R * J, P, ...]."""
        return where.reshape(1, len(page_ids), -1, *[1] * (new.ndim - 3))

    old = jnp.take(pages, page_ids, axis=1, mode="clip")
    old = jnp.where(mask(prepared.is_new[..., :1]), jnp.zeros_like(old), old)  # a page that is begun
    return pages.at[:, page_ids].set(jnp.where(mask(prepared.is_new), new, old), mode="drop")
