"""Plain jax.numpy paged attention: the CPU default and the oracle of the accelerators' kernels.

Shared items are read once for all rows, one item a loop iteration; private items go in blocks of R, each against its
own reader's queries. Both loops run over used items only. A row has one running softmax state over all that it reads,
so partial results never leave the loop and the plan's partials are not needed here.

Letters: R rows, T queries a row, H heads, K KV heads, G = H / K, D head dim, L tokens an item, B items a block.
"""

import jax.numpy as jnp
from jax import lax

from apr_kernels.kv_pages import NULL_PAGE, KVPages
from apr_kernels.plan import Plan


def paged_attention(q, kv_pages: KVPages, plan: Plan, tail_len, num_queries):
    """See `apr_kernels.paged_attention.api.paged_attention`."""
    num_rows, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_pages.num_kv_heads
    group = num_heads // num_kv_heads
    acc_dtype = jnp.promote_types(q.dtype, jnp.float32)
    q_heads = (q.astype(acc_dtype) * head_dim**-0.5).reshape(num_rows, num_tokens, num_kv_heads, group, head_dim)
    q_heads = q_heads.transpose(2, 0, 1, 3, 4)  # [K, R, T, G, D]
    valid_query = jnp.arange(num_tokens) < num_queries[:, None]  # [R, T]
    # State of the running softmax: maximum, sum [K, R, T, G], and weighted values [K, R, T, G, D].
    shape = q_heads.shape[:-1]
    state = (jnp.full(shape, -jnp.inf, acc_dtype), jnp.zeros(shape, acc_dtype), jnp.zeros(q_heads.shape, acc_dtype))
    state = _shared_items(state, q_heads, kv_pages, plan)
    m, l, o = _private_items(state, q_heads, kv_pages, plan, tail_len, num_queries)
    sees = valid_query[None, :, :, None] & (l > 0)
    o = jnp.where(sees[..., None], o / jnp.where(sees, l, 1)[..., None], 0)
    lse = jnp.where(sees, m + jnp.log(jnp.where(sees, l, 1)), -jnp.inf)
    o = o.transpose(1, 2, 0, 3, 4).reshape(q.shape).astype(q.dtype)
    return o, lse.transpose(1, 2, 0, 3).reshape(num_rows, num_tokens, num_heads)


def _finite(m):
    """m, with the -inf of rows that have seen nothing replaced: exp(-inf - finite) is 0, not NaN."""
    return jnp.where(m == -jnp.inf, 0, m)


def _gather(pages, page_ids, valid, dtype):
    """Reads pages: page_ids [..., C], valid [..., L] -> [K, ..., L, D], zero where not valid (0 x NaN is NaN)."""
    tokens = pages.at[:, page_ids].get(mode="clip")  # [K, ..., C, P, D]
    tokens = tokens.reshape(*tokens.shape[:-3], -1, tokens.shape[-1])
    return jnp.where(valid[..., None], tokens, 0).astype(dtype)


def _shared_items(state, q, kv_pages: KVPages, plan: Plan):
    if plan.num_shared == 0:
        return state
    num_kv_heads, num_rows = q.shape[:2]
    flat_q = q.reshape(num_kv_heads, -1, q.shape[-1])  # [K, R * T * G, D]
    used = jnp.sum(plan.rows[: plan.num_shared, 0] < plan.rows[: plan.num_shared, 1])
    row = jnp.arange(num_rows)

    def item(w, state):
        m, l, o = state
        valid = (jnp.arange(kv_pages.page_size) < plan.fills[w][:, None]).reshape(-1)  # [L]
        reads = (row >= plan.rows[w, 0]) & (row < plan.rows[w, 1])  # [R]
        keys = _gather(kv_pages.k, plan.pages[w], valid, q.dtype)
        values = _gather(kv_pages.v, plan.pages[w], valid, q.dtype)
        scores = jnp.einsum("knd,kld->knl", flat_q, keys).reshape(*q.shape[:-1], -1)  # [K, R, T, G, L]
        visible = reads[:, None] & valid  # [R, L]
        scores = jnp.where(visible[None, :, None, None, :], scores, -jnp.inf)
        new_m = jnp.maximum(m, scores.max(-1))
        weights = jnp.exp(scores - _finite(new_m)[..., None])
        shrink = jnp.exp(m - _finite(new_m))
        out = jnp.einsum("knl,kld->knd", weights.reshape(*flat_q.shape[:-1], -1), values).reshape(o.shape)
        return new_m, l * shrink + weights.sum(-1), o * shrink[..., None] + out

    return lax.fori_loop(0, used, item, state)


def _private_items(state, q, kv_pages: KVPages, plan: Plan, tail_len, num_queries):
    num_private = plan.num_items - plan.num_shared
    if num_private == 0:
        return state
    num_kv_heads, num_rows, num_tokens = q.shape[:3]
    block = min(num_rows, num_private)
    pad = -num_private % block

    def private(array):
        return jnp.pad(array[plan.num_shared :], [(0, pad)] + [(0, 0)] * (array.ndim - 1))

    rows, pages, fills = private(plan.rows), private(plan.pages), private(plan.fills)
    tail_slot, tail_offset = private(plan.tail_slot), private(plan.tail_offset)
    is_used = rows[:, 0] < rows[:, 1]
    reader = jnp.where(is_used, rows[:, 0], num_rows)
    own_len = tail_len.at[tail_slot].get(mode="clip")
    last_query = num_queries.at[reader].get(mode="clip") - 1  # keys beyond are not written, and may be NaN
    # Valid tokens of each page, at query 0; a tail's count grows by one with each query.
    page_offset = tail_offset[:, None] + jnp.arange(plan.item_pages) * kv_pages.page_size
    is_tail = tail_slot >= 0
    slots = jnp.where(is_tail[:, None], own_len[:, None] + 1 - page_offset, fills)
    slots = jnp.where((pages == NULL_PAGE) | ~is_used[:, None], -num_tokens, slots)  # [W', C]
    num_blocks = (jnp.sum(is_used) + block - 1) // block

    def step(i, state):
        m, l, o = state

        def part(array):
            return lax.dynamic_slice_in_dim(array, i * block, block)

        grows = jnp.minimum(jnp.arange(num_tokens), part(last_query)[:, None])
        grows = jnp.where(part(is_tail)[:, None], grows, 0)  # [B, T]
        limit = part(slots)[:, None, :, None] + grows[:, :, None, None]  # [B, T, C, 1]
        visible = jnp.arange(kv_pages.page_size) < limit
        visible = visible.reshape(block, num_tokens, -1)  # [B, T, L]
        valid = visible[:, -1]
        keys = _gather(kv_pages.k, part(pages), valid, q.dtype)  # [K, B, L, D]
        values = _gather(kv_pages.v, part(pages), valid, q.dtype)
        member = part(reader)[None, :] == jnp.arange(num_rows)[:, None]  # [R, B]
        own_q = q.at[:, part(reader)].get(mode="clip").reshape(num_kv_heads, block, -1, q.shape[-1])
        scores = jnp.einsum("kbnd,kbld->kbnl", own_q, keys).reshape(num_kv_heads, block, *q.shape[2:-1], -1)
        scores = jnp.where(visible[None, :, :, None, :], scores, -jnp.inf)  # [K, B, T, G, L]
        item_m = scores.max(-1)  # [K, B, T, G]
        weights = jnp.exp(scores - _finite(item_m)[..., None])
        item_l = weights.sum(-1)
        item_o = jnp.einsum("kbnl,kbld->kbnd", weights.reshape(*own_q.shape[:-1], -1), values)
        # Merge the block's items into their readers' states.
        spread = jnp.where(member[None, :, :, None, None], item_m[:, None], -jnp.inf)  # [K, R, B, T, G]
        new_m = jnp.maximum(m, spread.max(2))
        factor = jnp.exp(spread - _finite(new_m)[:, :, None])
        shrink = jnp.exp(m - _finite(new_m))
        new_l = l * shrink + (factor * item_l[:, None]).sum(2)
        out = jnp.einsum("krbtg,kbtgd->krtgd", factor, item_o.reshape(num_kv_heads, block, *q.shape[2:]))
        return new_m, new_l, o * shrink[..., None] + out

    return lax.fori_loop(0, num_blocks, step, state)
