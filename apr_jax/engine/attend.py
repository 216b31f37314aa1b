"""The one place where threads meet: the paged `attend` that the decoder calls under `jax.vmap`.

The decoder speaks of one thread; `vmap` adds the thread axis. This function's batching rule receives all rows at
once, so that a page several rows read is read once for all of them, and hands the pages back unbatched.
Letters: R rows, T tokens a row, H heads, K KV heads, Dh head_dim, S slots.
"""

import jax
import jax.numpy as jnp
from apr_kernels.kv_pages import KVPages
from apr_kernels.kv_update.api import kv_update
from apr_kernels.paged_attention.api import paged_attention
from apr_kernels.plan import Plan
from jax.custom_batching import custom_vmap

from apr_jax.models.decoder import Attend


def _attend_rows(q, k, v, kv_pages, plan, tail_len, num_queries):
    with jax.named_scope("kv_update"):
        kv_pages = kv_update(kv_pages, k, v, plan, tail_len, num_queries)
    with jax.named_scope("paged_attention"):
        o, _ = paged_attention(q, kv_pages, plan, tail_len, num_queries)
    return o, kv_pages


@custom_vmap
def _attend(q, k, v, kv_pages, plan, tail_len, num_queries):
    if plan.num_rows != 1:
        return jnp.zeros_like(q), kv_pages  # traced under vmap for its shapes; the rule below replaces it
    o, kv_pages = _attend_rows(q[None], k[None], v[None], kv_pages, plan, tail_len, num_queries)
    return o[0], kv_pages


@_attend.def_vmap
def _attend_batched(axis_size, in_batched, q, k, v, kv_pages, plan, tail_len, num_queries):
    assert all(in_batched[:3]), "q, k and v must all carry the thread axis"
    assert not any(jax.tree.leaves(in_batched[3:])), "pages, plan and lengths are shared by all threads"
    return _attend_rows(q, k, v, kv_pages, plan, tail_len, num_queries), (True, _all_false(in_batched[3]))


def _all_false(tree):
    return jax.tree.map(lambda _: False, tree)


def make_attend(plan: Plan, tail_len: jax.Array, num_queries: jax.Array) -> Attend:
    """The decoder's `attend` for one forward pass of all rows of `plan`.

    Args:
      tail_len: i32[S] tokens with keys in each slot's tail before this pass.
      num_queries: i32[R] valid tokens of each row.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: KVPages):
        return _attend(q, k, v, cache, plan, tail_len, num_queries)

    return attend
