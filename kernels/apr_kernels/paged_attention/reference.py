"""Plain jax.numpy paged attention: the CPU default and the oracle of the accelerators' kernels.

Shared items are read once for all rows, one item a loop iteration. Private items are cut into chunks of about
CHUNK_TOKENS tokens; those with anything to see go in blocks, each chunk against its own reader's queries.
Both loops run over what is used only. A row has one running softmax state over all that it reads, so partial
results never leave the loop and the plan's partials are not needed here.

What is derived from the plan and the lengths is the same for every layer; `prepare` computes it once a step.
Pages without valid tokens are replaced by one that has some, as masking the values themselves (0 x NaN is NaN)
would cost as much as reading them.

Letters: R rows, T queries a row, H heads, K KV heads, G = H / K, D head dim, P positions a page, C pages an
item, L tokens an item or chunk, B chunks a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from apr_kernels.kv_pages import NULL_PAGE, KVPages
from apr_kernels.plan import Plan

CHUNK_TOKENS = 64


class _State(NamedTuple):
    """Running softmax of every query: maximum and sum [K, R, T, G], weighted values [K, R, T, G, D]."""

    m: jax.Array
    l: jax.Array
    o: jax.Array


class _Shared(NamedTuple):
    """Shared items.

    Attributes:
      pages: [n, C] safe to read. fills: [n, C]. rows: [n, 2].
      count: [] how many are used; they come first.
    """

    pages: jax.Array
    fills: jax.Array
    rows: jax.Array
    count: jax.Array


class _Chunks(NamedTuple):
    """Private chunks, those with anything to see first, padded to whole blocks of B.

    Attributes:
      reader: [n] the row, R where nothing is to be seen.
      pages: [n, c] safe to read.
      limit: [n, c] valid slots of each page for query 0.
      growth: [n] by how much the last query's limit exceeds that; it grows by one a query, up to this.
    """

    reader: jax.Array
    pages: jax.Array
    limit: jax.Array
    growth: jax.Array


class Prepared(NamedTuple):
    """What all layers of a step have in common. None where the plan has no room for such items."""

    shared: _Shared | None
    private: _Chunks | None


def prepare(plan: Plan, tail_len, num_queries, page_size: int) -> Prepared:
    """See `apr_kernels.paged_attention.api.prepare`."""
    return Prepared(
        _prepare_shared(plan) if plan.num_shared else None,
        _prepare_private(plan, tail_len, num_queries, page_size) if plan.num_items > plan.num_shared else None,
    )


def paged_attention(q, kv_pages: KVPages, prepared: Prepared, num_queries):
    """See `apr_kernels.paged_attention.api.paged_attention`."""
    num_rows, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_pages.num_kv_heads
    group = num_heads // num_kv_heads
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q_heads = (q.astype(dtype) * head_dim**-0.5).reshape(num_rows, num_tokens, num_kv_heads, group, head_dim)
    q_heads = q_heads.transpose(2, 0, 1, 3, 4)  # [K, R, T, G, D]
    shape = q_heads.shape[:-1]
    state = _State(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros(q_heads.shape, dtype))
    if prepared.shared is not None:
        state = _shared_items(state, q_heads, kv_pages, prepared.shared)
    if prepared.private is not None:
        state = _private_chunks(state, q_heads, kv_pages, prepared.private)
    m, l, o = state
    sees = (jnp.arange(num_tokens) < num_queries[:, None])[None, :, :, None] & (l > 0)
    o = jnp.where(sees[..., None], o / jnp.where(sees, l, 1)[..., None], 0)
    lse = jnp.where(sees, m + jnp.log(jnp.where(sees, l, 1)), -jnp.inf)
    o = o.transpose(1, 2, 0, 3, 4).reshape(q.shape).astype(q.dtype)
    return o, lse.transpose(1, 2, 0, 3).reshape(num_rows, num_tokens, num_heads)


def _finite(m):
    """m, with the -inf of queries that have seen nothing replaced: exp(-inf - finite) is 0, not NaN."""
    return jnp.where(m == -jnp.inf, 0, m)


def _dot(equation: str, a, b):
    """A product at full precision: accelerators would round float32 operands otherwise."""
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)


def _readable(pages, has_tokens):
    """pages: [..., c], where those without valid tokens become the chunk's first page that has some."""
    first = jnp.take_along_axis(pages, jnp.argmax(has_tokens, axis=-1, keepdims=True), axis=-1)
    return jnp.where(has_tokens, pages, first)


def _gather(kv_pages: KVPages, page_ids, dtype):
    """Keys and values of pages page_ids: [..., c]: each [K, ..., c * P, D]."""

    def gather(pages, scale):
        """Whole pages gather fastest."""
        num_kv_heads, num_pages, page_size, head_dim = pages.shape
        head = jnp.arange(num_kv_heads).reshape(-1, *[1] * page_ids.ndim)
        index = head * num_pages + page_ids
        found = pages.reshape(-1, page_size * head_dim).at[index].get(mode="promise_in_bounds")
        found = found.reshape(num_kv_heads, *page_ids.shape[:-1], -1, head_dim).astype(dtype)
        if scale is None:
            return found
        scale = scale.reshape(-1, page_size).at[index].get(mode="promise_in_bounds")
        return found * scale.reshape(found.shape[:-1])[..., None].astype(dtype)

    return gather(kv_pages.k, kv_pages.k_scale), gather(kv_pages.v, kv_pages.v_scale)


def _prepare_shared(plan: Plan) -> _Shared:
    rows, fills = plan.rows[: plan.num_shared], plan.fills[: plan.num_shared]
    used = (rows[:, 0] < rows[:, 1]) & (fills > 0).any(-1)
    return _Shared(_readable(plan.pages[: plan.num_shared], fills > 0), fills, rows, jnp.sum(used))


def _shared_items(state: _State, q, kv_pages: KVPages, shared: _Shared) -> _State:
    num_kv_heads, num_rows = q.shape[:2]
    flat_q = q.reshape(num_kv_heads, -1, q.shape[-1])  # [K, R * T * G, D]
    pages, fills, rows, count = shared
    row = jnp.arange(num_rows)

    def item(w, state: _State) -> _State:
        valid = (jnp.arange(kv_pages.page_size) < fills[w][:, None]).reshape(-1)  # [L]
        reads = (row >= rows[w, 0]) & (row < rows[w, 1])  # [R]
        keys, values = _gather(kv_pages, pages[w], q.dtype)
        scores = _dot("knd,kld->knl", flat_q, keys).reshape(*q.shape[:-1], -1)  # [K, R, T, G, L]
        visible = reads[:, None] & valid  # [R, L]
        scores = jnp.where(visible[None, :, None, None, :], scores, -jnp.inf)
        m = jnp.maximum(state.m, scores.max(-1))
        weights = jnp.exp(scores - _finite(m)[..., None])
        shrink = jnp.exp(state.m - _finite(m))
        out = _dot("knl,kld->knd", weights.reshape(*flat_q.shape[:-1], -1), values)
        return _State(m, state.l * shrink + weights.sum(-1), state.o * shrink[..., None] + out.reshape(q.shape))

    return lax.fori_loop(0, count, item, state)


def _block_size(num_rows: int, num_chunks: int) -> int:
    """Chunks a loop iteration takes: about one a row, as more are partly idle and fewer do not fill a product."""
    return min(max(num_rows, 4), num_chunks)


def _prepare_private(plan: Plan, tail_len, num_queries, page_size: int) -> _Chunks:
    num_rows, item_pages = plan.num_rows, plan.item_pages
    chunk_pages = max(
        c for c in range(1, item_pages + 1) if item_pages % c == 0 and (c == 1 or c * page_size <= CHUNK_TOKENS)
    )
    rows, pages = plan.rows[plan.num_shared :], plan.pages[plan.num_shared :]
    tail_slot, tail_offset = plan.tail_slot[plan.num_shared :], plan.tail_offset[plan.num_shared :]
    is_tail, reader = tail_slot >= 0, rows[:, 0]
    # A tail's key tail_len + t is written, and seen from query t on, where t < num_queries.
    growth = jnp.where(is_tail, num_queries.at[reader].get(mode="clip") - 1, 0)
    page_offset = tail_offset[:, None] + jnp.arange(item_pages) * page_size
    limit = tail_len.at[tail_slot].get(mode="clip")[:, None] + 1 - page_offset
    limit = jnp.where(is_tail[:, None], limit, plan.fills[plan.num_shared :])
    is_read = (rows[:, 0] < rows[:, 1])[:, None] & (pages != NULL_PAGE)
    has_tokens = is_read & (limit + growth[:, None] > 0)
    limit = jnp.where(has_tokens, limit, jnp.iinfo(jnp.int32).min // 2)

    def cut(array):
        if array.ndim == 1:
            return jnp.repeat(array, item_pages // chunk_pages)
        return array.reshape(-1, chunk_pages)

    has_tokens = cut(has_tokens)
    used = has_tokens.any(-1)
    chunks = _Chunks(
        reader=jnp.where(used, cut(reader), num_rows),
        pages=_readable(cut(pages), has_tokens),
        limit=cut(limit),
        growth=cut(growth),
    )
    total = used.shape[0]
    size = total + -total % _block_size(num_rows, total)
    # Used chunks move to the front; the others, and the padding, read nothing.
    order = jnp.full(size, total).at[jnp.where(used, jnp.cumsum(used) - 1, size)].set(jnp.arange(total), mode="drop")
    moved = jax.tree.map(lambda array: array.at[order].get(mode="fill", fill_value=NULL_PAGE), chunks)
    return moved._replace(reader=chunks.reader.at[order].get(mode="fill", fill_value=num_rows))


def _private_chunks(state: _State, q, kv_pages: KVPages, chunks: _Chunks) -> _State:
    num_kv_heads, num_rows, num_tokens = q.shape[:3]
    block = _block_size(num_rows, chunks.reader.shape[0])
    num_blocks = (jnp.sum(chunks.reader < num_rows) + block - 1) // block

    def step(i, state: _State) -> _State:
        part = jax.tree.map(lambda array: lax.dynamic_slice_in_dim(array, i * block, block), chunks)
        growth = jnp.minimum(jnp.arange(num_tokens), part.growth[:, None])  # [B, T]
        visible = jnp.arange(kv_pages.page_size) < (part.limit[:, None] + growth[:, :, None])[..., None]
        visible = visible.reshape(block, num_tokens, -1)  # [B, T, L]
        keys, values = _gather(kv_pages, part.pages, q.dtype)  # [K, B, L, D]
        own_q = q.at[:, part.reader].get(mode="clip").reshape(num_kv_heads, block, -1, q.shape[-1])
        scores = _dot("kbnd,kbld->kbnl", own_q, keys).reshape(num_kv_heads, block, *q.shape[2:-1], -1)
        scores = jnp.where(visible[None, :, :, None, :], scores, -jnp.inf)  # [K, B, T, G, L]
        chunk_m = scores.max(-1)  # [K, B, T, G]
        weights = jnp.exp(scores - _finite(chunk_m)[..., None])
        out = _dot("kbnl,kbld->kbnd", weights.reshape(*own_q.shape[:-1], -1), values)
        # Merge the block's chunks into their readers' states.
        member = part.reader == jnp.arange(num_rows)[:, None]  # [R, B]
        spread = jnp.where(member[None, :, :, None, None], chunk_m[:, None], -jnp.inf)  # [K, R, B, T, G]
        m = jnp.maximum(state.m, spread.max(2))
        factor = jnp.exp(spread - _finite(m)[:, :, None])
        shrink = jnp.exp(state.m - _finite(m))
        l = state.l * shrink + (factor * weights.sum(-1)[:, None]).sum(2)
        out = jnp.where((part.reader < num_rows)[None, :, None, None], out, 0)
        out = _dot("krbtg,kbtgd->krtgd", factor, out.reshape(num_kv_heads, block, *q.shape[2:]))
        return _State(m, l, state.o * shrink[..., None] + out)

    return lax.fori_loop(0, num_blocks, step, state)
