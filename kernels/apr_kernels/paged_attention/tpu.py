"""Paged attention on TPUs: Pallas, Mosaic TPU.

A TPU core runs a grid in order, so the softmax state of many queries can stay in its vector memory (VMEM) while the
items pass by. A grid step takes some KV heads and a window of queries; it reads every item that any of them reads
once, for all of them, updates their running maxima, sums and outputs in place, and writes each query's result once.
Partial results never leave VMEM: there is nothing to merge, and the plan's partials are not needed here. In decode
one window holds all rows, so that every page is read once. In prefill a window holds a few hundred queries a head,
enough for the matrix units to be the limit although each window reads its items again.

Items are cut into blocks of pages, and blocks fetched by asynchronous copies straight from the store, some blocks
ahead. Which rows read an item lies in scalar memory (SMEM, 1 MiB) from the start; page ids, which would not fit
there, follow in chunks, one chunk ahead.

The rows of an item are an interval, and so are their queries of one KV head. Tiles of queries start at a multiple
of 16 rows, as registers demand; rows of a tile that do not read the item are masked, which leaves their state
as it is.

The running softmax is that of Milakov and Gimelshein (arXiv 1805.02867), as in FlashAttention (arXiv 2205.14135).

Letters: R rows, T queries a row, H heads, K KV heads, G = H / K, D head dim, L lanes of a stored token, W items,
C pages an item, N pages, P positions a page; M = R * T * G queries of a KV head, in order of row, token and head.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from apr_kernels.kv_pages import LANE_PACKED, LANES, NULL_PAGE, KVPages
from apr_kernels.paged_attention import tuning
from apr_kernels.paged_attention.tpu_kernel import CHUNK, Sizes, kernel
from apr_kernels.plan import Plan

NOTHING = -(2**30)  # the limit of a page of which nothing is visible


@functools.partial(jax.tree_util.register_dataclass, data_fields=("chunks",), meta_fields=("num_pages",))
@dataclasses.dataclass(frozen=True)
class ItemPages:
    """Pages of items, in chunks that go to SMEM at once.

    Attributes:
      chunks: i32[n, CHUNK / LANES, LANES]. Of an item: C page ids, then C limits: how many slots of a page query 0 of
        the reader sees; a query sees one more than the one before it, up to `growth` more.
      num_pages: C.
    """

    chunks: jax.Array
    num_pages: int


class Prepared(NamedTuple):
    """The used items, shared ones first, with no gap between them and the private ones.

    Attributes:
      item_pages: their pages.
      lo, hi: i32[W] the rows that read an item.
      growth: i32[W] 0 but for tails.
      num_shared, num_items: [] used items: shared, and all.
    """

    item_pages: ItemPages
    lo: jax.Array
    hi: jax.Array
    growth: jax.Array
    num_shared: jax.Array
    num_items: jax.Array


def _item_stride(item_pages: int) -> int:
    """Integers that an item has in a chunk: 2 C, rounded up to a power of two."""
    return pl.next_power_of_2(2 * item_pages)


def prepare(plan: Plan, tail_len, num_queries, page_size: int) -> Prepared:
    """See `apr_kernels.paged_attention.api.prepare`."""
    lo, hi = plan.rows[:, 0], plan.rows[:, 1]
    used = lo < hi
    is_tail = plan.tail_slot >= 0
    offset = plan.tail_offset[:, None] + jnp.arange(plan.item_pages) * page_size
    limits = tail_len.at[plan.tail_slot].get(mode="clip")[:, None] + 1 - offset
    limits = jnp.where(is_tail[:, None], limits, plan.fills)
    limits = jnp.where(used[:, None] & (plan.pages != NULL_PAGE), limits, NOTHING)
    growth = jnp.where(is_tail, num_queries.at[lo].get(mode="clip") - 1, 0)
    num_shared = jnp.sum(used[: plan.num_shared])

    def close_gap(array):
        """Moves the private items to where the used shared ones end."""
        start = (num_shared, *[0] * (array.ndim - 1))
        return lax.dynamic_update_slice(array, array[plan.num_shared :], start)

    stride = _item_stride(plan.item_pages)
    if stride > CHUNK:
        raise ValueError(f"{plan.item_pages} pages an item, must be at most {CHUNK // 2}")
    pages = jnp.concatenate([plan.pages, limits], axis=1)
    pages = jnp.pad(close_gap(pages), [(0, -plan.num_items % (CHUNK // stride)), (0, stride - pages.shape[1])])
    return Prepared(
        ItemPages(pages.reshape(-1, CHUNK // LANES, LANES), plan.item_pages),
        close_gap(lo),
        close_gap(hi),
        close_gap(growth),
        num_shared,
        jnp.sum(used),
    )


def paged_attention(q, kv_pages: KVPages, prepared: Prepared, num_queries, *, cores: int, interpret: Any = False):
    """See `apr_kernels.paged_attention.api.paged_attention`. `interpret` may be a `pltpu.InterpretParams`."""
    num_rows, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_pages.num_kv_heads
    group = num_heads // num_kv_heads
    sizes = _sizes(q, kv_pages, prepared, cores)
    size = num_rows * num_tokens * group  # M
    q_heads = q.reshape(num_rows, num_tokens, num_kv_heads, group, head_dim).transpose(2, 0, 1, 3, 4)
    q_heads = q_heads.reshape(num_kv_heads, size, head_dim).astype(sizes.dtype)
    q_heads = jnp.pad(q_heads, [(0, 0), (0, -size % sizes.window), (0, kv_pages.k.shape[-1] - head_dim)])
    o, lse = _call(q_heads, kv_pages, prepared, sizes, q.dtype, interpret)
    first = head_dim if kv_pages.format == LANE_PACKED else 0  # there the lanes before are products with keys

    def by_row(x):
        """[K, M, ...] as [R, T, H, ...]."""
        x = x[:, :size].reshape(num_kv_heads, num_rows, num_tokens, group, *x.shape[2:])
        return jnp.moveaxis(x, 0, 2).reshape(num_rows, num_tokens, num_heads, *x.shape[4:])

    o, lse = by_row(o[..., first : first + head_dim]), by_row(lse.reshape(num_kv_heads, -1))
    valid = (jnp.arange(num_tokens) < num_queries[:, None])[..., None]
    return jnp.where(valid[..., None], o, 0), jnp.where(valid, lse, -jnp.inf)


def _sizes(q, kv_pages: KVPages, prepared: Prepared, cores: int) -> Sizes:
    num_rows, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, width = kv_pages.num_kv_heads, kv_pages.k.shape[-1]
    group = num_heads // num_kv_heads
    exact = jnp.float32 in (q.dtype, kv_pages.dtype)
    dtype = jnp.dtype(jnp.float32 if exact else jnp.bfloat16)
    item_pages = prepared.item_pages.num_pages
    arrays = 1 if kv_pages.v is None else 2
    blocks = tuning.tpu_blocks(
        num_kv_heads,
        num_rows * num_tokens * group,
        num_tokens,
        item_pages,
        kv_pages.page_size,
        token_bytes=arrays * width * kv_pages.dtype.itemsize,
        query_bytes=2 * width * (dtype.itemsize + q.dtype.itemsize) + 4 * (width + 2 * LANES),
        cores=cores,
    )
    return Sizes(
        heads=blocks.heads,
        window=blocks.window,
        block_pages=blocks.block_pages,
        buffers=blocks.buffers,
        item_pages=item_pages,
        item_stride=_item_stride(item_pages),
        group=group,
        row_queries=num_tokens * group,
        num_pages=kv_pages.num_pages,
        page_size=kv_pages.page_size,
        dtype=dtype,
        scale=head_dim**-0.5,
        has_values=kv_pages.v is not None,
        has_scales=kv_pages.k_scale is not None,
    )


def _ranges(prepared: Prepared, sizes: Sizes, num_windows: int):
    """i32[4 * windows]: the items [first, last) of each window's two parts: the shared and the private ones.

    One window reads all items, as one part: its copies never pause.
    """
    if num_windows == 1:
        return jnp.stack([0, prepared.num_items, 0, 0]).astype(jnp.int32)
    w = jnp.arange(prepared.lo.shape[0])
    begin = jnp.arange(num_windows)[:, None] * sizes.window
    reads = (prepared.lo * sizes.row_queries < begin + sizes.window) & (prepared.hi * sizes.row_queries > begin)
    ranges = []
    for first, last in ((0, prepared.num_shared), (prepared.num_shared, prepared.num_items)):
        inside = reads & (w >= first) & (w < last)
        ranges += [jnp.min(jnp.where(inside, w, last), axis=1), jnp.max(jnp.where(inside, w + 1, first), axis=1)]
    return jnp.stack(ranges, axis=1).reshape(-1).astype(jnp.int32)


def _call(q, kv_pages: KVPages, prepared: Prepared, sizes: Sizes, dtype, interpret):
    """q: [K, M, L] with M padded to whole windows. Returns o: [K, M, L] and lse: f32[K, windows, ..., LANES]."""
    num_kv_heads, num_queries, width = q.shape
    num_windows = num_queries // sizes.window
    stores = [array for array in (kv_pages.k, kv_pages.v, kv_pages.k_scale) if array is not None]
    if not interpret:  # or XLA reads a small store to VMEM as a whole
        stores = [pltpu.with_memory_space_constraint(store, pltpu.HBM) for store in stores]
    queries = pl.BlockSpec((sizes.heads, sizes.window, width), lambda i, j, *_: (i, j, 0))
    logs = (sizes.window // LANES, LANES)
    state = (sizes.heads, sizes.window)
    return pl.pallas_call(
        functools.partial(kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_kv_heads // sizes.heads, num_windows),
            in_specs=[queries, *[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(stores))],
            out_specs=[queries, pl.BlockSpec((sizes.heads, 1, *logs), lambda i, j, *_: (i, j, 0, 0))],
            scratch_shapes=[
                pltpu.SMEM((2, CHUNK // LANES, LANES), jnp.int32),
                *[
                    pltpu.VMEM((sizes.buffers, sizes.heads, sizes.block_pages, *store.shape[2:]), store.dtype)
                    for store in stores
                ],
                pltpu.VMEM((*state, width), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((sizes.buffers,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_kv_heads, num_queries, width), dtype),
            jax.ShapeDtypeStruct((num_kv_heads, num_windows, *logs), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="paged_attention",
    )(
        _ranges(prepared, sizes, num_windows),
        prepared.lo,
        prepared.hi,
        prepared.growth,
        q,
        prepared.item_pages.chunks,
        *stores,
    )
