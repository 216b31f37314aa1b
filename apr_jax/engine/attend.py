"""The one place where threads meet: the paged `attend` that the decoder calls under `jax.vmap`.

The decoder speaks of one thread; `vmap` adds the thread axis. This function's batching rule receives all rows at
once, so that a page several rows read is read once for all of them, and hands the pages back unbatched.
Letters: R rows, T tokens a row, H heads, K KV heads, Dh head_dim, S slots.
"""

import jax
import jax.numpy as jnp
from apr_kernels.kv_pages import KVPages
from apr_kernels.kv_update import api as update_api
from apr_kernels.paged_attention import api as attention_api
from apr_kernels.plan import Plan
from jax.custom_batching import custom_vmap

from apr_jax.models.decoder import Attend


def _attend_rows(q, k, v, kv_pages, step):
    plan, tail_len, num_queries, update, attention = step
    kv_pages = update_api.kv_update(kv_pages, k, v, plan, tail_len, num_queries, update)
    o, _ = attention_api.paged_attention(q, kv_pages, plan, tail_len, num_queries, attention)
    return o, kv_pages


@custom_vmap
def _attend(q, k, v, kv_pages, step):
    if step[0].num_rows != 1:
        return jnp.zeros_like(q), kv_pages  # traced under vmap for its shapes; the rule below replaces it
    o, kv_pages = _attend_rows(q[None], k[None], v[None], kv_pages, step)
    return o[0], kv_pages


@_attend.def_vmap
def _attend_batched(axis_size, in_batched, q, k, v, kv_pages, step):
    assert all(in_batched[:3]), "q, k and v must all carry the thread axis"
    assert not any(jax.tree.leaves(in_batched[3:])), "pages, plan and lengths are shared by all threads"
    return _attend_rows(q, k, v, kv_pages, step), (True, _all_false(in_batched[3]))


def _all_false(tree):
    return jax.tree.map(lambda _: False, tree)


def make_attend(plan: Plan, tail_len: jax.Array, num_queries: jax.Array, num_tokens: int, kv_pages: KVPages) -> Attend:
    """The decoder's `attend` for one forward pass of all rows of `plan`.

    Args:
      tail_len: i32[S] tokens with keys in each slot's tail before this pass.
      num_queries: i32[R] valid tokens of each row.
      num_tokens: T, tokens of a row.
      kv_pages: any layer's pages; only their sizes are used.
    """
    update = update_api.prepare(plan, tail_len, num_queries, num_tokens, kv_pages)
    attention = attention_api.prepare(plan, tail_len, num_queries, kv_pages.page_size)
    step = (plan, tail_len, num_queries, update, attention)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: KVPages):
        return _attend(q, k, v, cache, step)

    return attend
