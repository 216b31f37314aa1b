"""Write of new keys and values on NVIDIA GPUs, for both attention backends: one XLA scatter an array.

XLA's GPU compiler scatters in place into a donated store. A branch would not be (a `lax.cond` that zeroes begun
pages makes it copy a whole store), nor is reading old pages needed: a slot of a touched page receives a new token, or
zero if it is free and the page is begun now, or nothing.

Letters: R rows, T tokens a row, J pages that T tokens may touch, K KV heads, N pages, P positions a page.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from apr_kernels.kv_pages import KVPages, is_quantised, quantise
from apr_kernels.kv_update import reference
from apr_kernels.plan import Plan


class Prepared(NamedTuple):
    """Where a step's tokens go.

    Attributes:
      place: i32[R, J, P] the slot, page * P + position, written from each slot of the touched pages; distinct, and
        beyond the store (dropped) where nothing is written.
      token: i32[R, J, P] index among the row's T tokens of what goes there.
      is_new: bool[R, J, P] whether it is a token, not zero.
    """

    place: jax.Array
    token: jax.Array
    is_new: jax.Array


def prepare(plan: Plan, tail_len, num_queries, num_tokens: int, page_size: int, num_pages: int) -> Prepared:
    """See `apr_kernels.kv_update.api.prepare`."""
    page_ids, token, is_new, _ = reference.prepare(plan, tail_len, num_queries, num_tokens, page_size, num_pages)
    begun = is_new[..., :1]
    place = page_ids[..., None] * page_size + jnp.arange(page_size)
    # Distinct places everywhere: the scatter need not be atomic.
    nowhere = num_pages * page_size + jnp.arange(place.size).reshape(place.shape)
    return Prepared(jnp.where(is_new | begun, place, nowhere), jnp.clip(token, 0, num_tokens - 1), is_new)


def kv_update(kv_pages: KVPages, k, v, prepared: Prepared, *, interpret: bool = False) -> KVPages:
    """See `apr_kernels.kv_update.api.kv_update`. `interpret` changes nothing: XLA runs this anywhere."""
    del interpret
    new: dict[str, jax.Array] = {"k": k, "v": v}
    if is_quantised(kv_pages.dtype):
        for name in ("k", "v"):
            new[name], new[f"{name}_scale"] = quantise(new[name], kv_pages.dtype)
    return dataclasses.replace(
        kv_pages, **{name: _write(getattr(kv_pages, name), each, prepared) for name, each in new.items()}
    )


def _write(pages, new, prepared: Prepared):
    """Scatters new: [R, T, K, ...] into pages: [K, N, P, ...]."""
    num_rows = new.shape[0]
    new = new.astype(pages.dtype)[jnp.arange(num_rows)[:, None, None], prepared.token]  # [R, J, P, K, ...]
    is_new = prepared.is_new.reshape(*prepared.is_new.shape, *[1] * (new.ndim - 3))
    new = jnp.moveaxis(jnp.where(is_new, new, jnp.zeros_like(new)), 3, 0)  # [K, R, J, P, ...]
    slots = pages.reshape(pages.shape[0], -1, *pages.shape[3:])
    written = slots.at[:, prepared.place].set(new, mode="drop", unique_indices=True)
    return written.reshape(pages.shape)
