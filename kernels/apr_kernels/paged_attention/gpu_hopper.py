"""Paged attention on NVIDIA GPUs of compute capability 9.0: Pallas, Mosaic GPU.

A *run* (adjacent items with the same rows and partial_start) is one list of pages and one contiguous range of
queries of each KV head: reader x T x G. A *window* is a block of at most 128 of those queries; a *unit* is a
window and a KV head. One CTA a multiprocessor stays resident and works through its share of the units. In each:

- the *producer* warpgroup copies pages into a ring of shared-memory tiles with the tensor memory accelerator
  (TMA), and runs ahead into the next unit while the consumers finish this one: with one reader a unit is bound by
  memory, and the ring keeps over 100 KB in flight a multiprocessor, without gaps between units;
- two *consumer* warpgroups own 64 queries each and share every tile, so that a page goes from the L2 cache to
  shared memory once for 128 queries (64 would need more than the L2 cache delivers): scores and weighted values by
  wgmma, the online softmax in float32 registers. With 64 queries or fewer the second one only hands tiles back.

A run's softmax state is kept in registers until its last page and written once, as a partial a query:
`merge.merge` combines them.

What tokens a query sees is one number a token, prepared once a step for all layers: 0 (all queries), -t (queries
from t on) or HIDDEN. Added to the scaled scores it masks at no cost (it takes the place of a multiplication's
unused addend); only tiles with a token that some queries may not see yet need a comparison.

Letters: W items, C pages an item, R rows, T queries a row, H heads, K KV heads, G = H / K, D head dim, N pages of
the store, P positions a page, X partials in all, M queries a window, B windows at most, L pages of all runs
together, each run's rounded up to whole tiles.

Source: the warp specialisation follows FlashAttention-3 (arXiv 2407.08608).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apr_kernels.kv_pages import NULL_PAGE, KVPages
from apr_kernels.paged_attention import gpu_hopper_merge
from apr_kernels.paged_attention.gpu_hopper_windows import WINDOW_FIELDS, Prepared, make_windows
from apr_kernels.paged_attention.gpu_hopper_windows import prepare as prepare
from apr_kernels.paged_attention.merge import merge
from apr_kernels.paged_attention.tuning import HopperBlocks, hopper_blocks

ROWS = 64  # queries of a consumer: the M of a wgmma
STATS = 8  # lanes a query's maximum and sum take, half each: a copy is 16 bytes at least, a wgmma layout 8 lanes
NEGATIVE = -1e20  # the running maximum's start: far above HIDDEN, so that hidden scores weigh nothing
SLAB = 8  # rows of a shared-memory tile: copies of queries begin at multiples of it


def paged_attention(q, kv_pages: KVPages, prepared: Prepared, num_queries, *, interpret: bool = False):
    """See `apr_kernels.paged_attention.api.paged_attention`."""
    _, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_pages.num_kv_heads
    group = num_heads // num_kv_heads
    blocks = hopper_blocks(head_dim)
    queries = num_tokens * group  # of a row and KV head
    windows, num_windows = make_windows(prepared, queries, group, blocks.consumers * ROWS, blocks.tile, num_tokens)
    num_partials = prepared.partials.shape[0] * prepared.partials.shape[1]
    o, stats = _run_kernel(
        _shifted_queries(q, num_kv_heads, blocks.consumers * ROWS),
        kv_pages,
        prepared,
        windows,
        num_windows,
        num_rows_out=num_partials * queries,
        chunk=math.gcd(queries, ROWS),
        group=group,
        causal=num_tokens > 1,
        blocks=blocks,
        interpret=interpret,
    )
    if gpu_hopper_merge.can_merge(head_dim):
        return gpu_hopper_merge.merge(
            o, stats, prepared.partials, num_queries, num_tokens, q.dtype, interpret=interpreter(interpret)
        )
    shape = (num_kv_heads, num_partials, queries)
    m, l = (stats[..., lane].reshape(shape) for lane in (0, -1))
    return merge(o.reshape(*shape, head_dim), m, l, prepared.partials, num_queries, num_tokens, q.dtype)


def _shifted_queries(q, num_kv_heads: int, rows: int):
    """Queries [S, K, R * T * G + padding, D]: copy s begins at query s * g, g = gcd(T * G, SLAB).

    Tiled copies begin at multiples of SLAB rows and a row's queries at multiples of g: with S = SLAB / g shifted
    copies every row begins at one of either. Queries are few: this costs less than gathering them by window.
    """
    num_rows, num_tokens, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    step = math.gcd(num_tokens * group, SLAB)
    q = q.reshape(num_rows, num_tokens, num_kv_heads, group, head_dim).transpose(2, 0, 1, 3, 4)
    q = q.reshape(num_kv_heads, -1, head_dim)
    size = -(-q.shape[1] // SLAB) * SLAB + rows
    q = jnp.pad(q, ((0, 0), (0, size + SLAB - q.shape[1]), (0, 0)))
    return jnp.stack([q[:, shift : shift + size] for shift in range(0, SLAB, step)])


class _Memory(NamedTuple):
    """Shared memory and barriers of a CTA; one of each a consumer or a slot of the ring."""

    q_o: jax.Array
    stats: jax.Array
    k: jax.Array
    v: jax.Array
    visible: jax.Array
    q_full: jax.Array
    k_full: jax.Array
    v_full: jax.Array
    k_free: jax.Array
    v_free: jax.Array


def _run_kernel(q, kv_pages, prepared, windows, num_windows, *, num_rows_out, chunk, group, causal, blocks, interpret):
    """Returns o: f32[K, X * T * G, D] and stats: f32[K, X * T * G, STATS], maximum first, sum last."""
    num_kv_heads, head_dim = q.shape[1], q.shape[3]
    dtype = kv_pages.dtype
    swizzle = plgpu.find_swizzle(head_dim * 16)
    tiles = (plgpu.TilingTransform((SLAB, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    consumers, stages, tile = blocks.consumers, blocks.stages, blocks.tile
    page_copies = max(1, tile // kv_pages.page_size)
    # A consumer's queries are read before its results are staged, in the same memory: hence two times 64 rows.
    q_smem = plgpu.SMEM((consumers, 2, ROWS, head_dim), dtype, transforms=tiles)
    o_smem = plgpu.SMEM((consumers, ROWS, head_dim), jnp.float32)
    scratch = _Memory(
        q_o=(q_smem, o_smem) if interpret else plgpu.RefUnion(q_smem, o_smem),
        stats=plgpu.SMEM((consumers, ROWS, STATS), jnp.float32),
        k=plgpu.SMEM((stages, tile, head_dim), dtype, transforms=tiles),
        v=plgpu.SMEM((stages, tile, head_dim), dtype, transforms=tiles),
        visible=plgpu.SMEM((stages, tile), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=consumers),
        k_full=plgpu.Barrier(num_arrivals=page_copies + 1, num_barriers=stages),
        v_full=plgpu.Barrier(num_arrivals=page_copies, num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    )
    body = functools.partial(
        _kernel, chunk=chunk, group=group, causal=causal, blocks=blocks, page_size=kv_pages.page_size,
        interpret=interpret,
    )  # fmt: skip
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((num_kv_heads, num_rows_out, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_kv_heads, num_rows_out, STATS), jnp.float32),
        ],
        scratch_types=[scratch],
        grid=(2 if interpret else blocks.ctas,),
        grid_names=("cta",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        interpret=interpreter(interpret),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    num_units = (num_windows * num_kv_heads).reshape(1)
    return kernel(num_units, windows, prepared.page_ids, prepared.visible, q.astype(dtype), kv_pages.k, kv_pages.v)


def interpreter(interpret: bool):
    """The `interpret` of a Mosaic GPU kernel."""
    if not interpret:
        return None
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from 0.11 on

    return InterpretGPUParams()


class _Unit(NamedTuple):
    """A window's fields (see WINDOW_FIELDS), and the KV head."""

    first_page: jax.Array
    num_pages: jax.Array
    num_tiles: jax.Array
    num_plain: jax.Array
    q_copy: jax.Array
    q_row: jax.Array
    out_row: jax.Array
    num_live: jax.Array
    first_query: jax.Array
    head: jax.Array


def _kernel(
    num_units_ref, windows_ref, page_ids_ref, visible_ref, q_ref, k_ref, v_ref, o_ref, stats_ref, memory: _Memory,
    *, chunk: int, group: int, causal: bool, blocks: HopperBlocks, page_size: int, interpret: bool,
):  # fmt: skip
    num_kv_heads, num_pages = k_ref.shape[:2]
    cta, num_ctas = lax.axis_index("cta"), (2 if interpret else blocks.ctas)
    warpgroup = lax.axis_index("warpgroup")
    num_units = (num_units_ref[0] - cta + num_ctas - 1) // num_ctas

    def read_unit(i) -> _Unit:
        unit = cta + i * num_ctas
        at = (unit // num_kv_heads) * len(WINDOW_FIELDS)
        return _Unit(*(windows_ref[at + field] for field in range(len(WINDOW_FIELDS))), unit % num_kv_heads)

    @pl.when(warpgroup < blocks.consumers)
    def _():
        if not interpret:
            plgpu.set_max_registers(blocks.consumer_registers, action="increase")
        _consume(
            read_unit, num_units, warpgroup, q_ref, o_ref, stats_ref, memory,
            chunk=chunk, group=group, causal=causal, blocks=blocks, interpret=interpret,
        )  # fmt: skip

    @pl.when(warpgroup == blocks.consumers)
    def _():
        if not interpret:
            plgpu.set_max_registers(blocks.producer_registers, action="decrease")
        _produce(
            read_unit, num_units, page_ids_ref, visible_ref, k_ref, v_ref, memory,
            num_pages=num_pages, blocks=blocks, page_size=page_size,
        )  # fmt: skip


def _produce(
    read_unit, num_units, page_ids_ref, visible_ref, k_ref, v_ref, memory: _Memory, *, num_pages, blocks, page_size
):
    """Fills the ring, tile after tile, unit after unit."""
    tile, stages = blocks.tile, blocks.stages
    copies, rows = max(1, tile // page_size), min(tile, page_size)

    def fill_unit(i, count):
        unit = read_unit(i)

        def fill(t, count):
            slot = lax.rem(count, stages)
            ids, offset = [], 0
            for j in range(copies):
                page = t * copies + j if tile >= page_size else t // (page_size // tile)
                # Past the run's end its last page is read again: its tokens are hidden, but never NaN.
                page_id = page_ids_ref[unit.first_page + jnp.minimum(page, unit.num_pages - 1)]
                ids.append(jnp.clip(page_id, NULL_PAGE, num_pages - 1))
            if tile < page_size:
                offset = lax.rem(t, page_size // tile) * tile

            def copy(source, target, full):
                for j in range(copies):
                    positions = pl.ds(offset, rows)
                    target_rows = target.at[slot, pl.ds(j * rows, rows)]
                    plgpu.copy_gmem_to_smem(source.at[unit.head, ids[j], positions], target_rows, full.at[slot])

            plgpu.barrier_wait(memory.k_free.at[slot])
            first_token = pl.multiple_of(unit.first_page * page_size + t * tile, SLAB)
            plgpu.copy_gmem_to_smem(
                visible_ref.at[pl.ds(first_token, tile)], memory.visible.at[slot], memory.k_full.at[slot]
            )
            copy(k_ref, memory.k, memory.k_full)
            plgpu.barrier_wait(memory.v_free.at[slot])
            copy(v_ref, memory.v, memory.v_full)
            return count + 1

        return lax.fori_loop(0, unit.num_tiles, fill, count)

    count = lax.fori_loop(0, num_units, fill_unit, jnp.int32(0))

    def drain(i, carry):
        slot = lax.rem(count + i, stages)
        plgpu.barrier_wait(memory.k_free.at[slot])
        plgpu.barrier_wait(memory.v_free.at[slot])
        return carry

    lax.fori_loop(0, stages, drain, ())


def _consume(
    read_unit, num_units, warpgroup, q_ref, o_ref, stats_ref, memory: _Memory,
    *, chunk: int, group: int, causal: bool, blocks: HopperBlocks, interpret: bool,
):  # fmt: skip
    """Attends 64 queries of every unit to all of its tiles."""
    q_smem, o_smem = memory.q_o
    q_smem, o_smem = q_smem.at[warpgroup, 0], o_smem.at[warpgroup]
    stats_smem, q_full = memory.stats.at[warpgroup], memory.q_full.at[warpgroup]
    head_dim, tile, stages = q_ref.shape[-1], blocks.tile, blocks.stages
    scale = math.log2(math.e) * head_dim**-0.5  # scores in powers of two
    layout = plgpu.Layout.WGMMA

    def cast(x, layout):
        return x if interpret else plgpu.layout_cast(x, layout)

    def lanes(x, shape):  # one number a query
        return lax.broadcast_in_dim(x, shape, [0])

    for slot in range(stages):
        plgpu.barrier_arrive(memory.k_free.at[slot])
        plgpu.barrier_arrive(memory.v_free.at[slot])

    def skip(t, count):
        slot = lax.rem(count, stages)
        plgpu.barrier_wait(memory.k_full.at[slot])
        plgpu.barrier_arrive(memory.k_free.at[slot])
        plgpu.barrier_wait(memory.v_full.at[slot])
        plgpu.barrier_arrive(memory.v_free.at[slot])
        return count + 1

    def attend(unit: _Unit, count):
        row = pl.multiple_of(unit.q_row + warpgroup * ROWS, SLAB)
        plgpu.copy_gmem_to_smem(q_ref.at[unit.q_copy, unit.head, pl.ds(row, ROWS)], q_smem, q_full)
        plgpu.barrier_wait(q_full)

        def token_of_query():
            """f32[ROWS]: the t of each query; runs with hidden-until tokens have one reader."""
            index = cast(lax.broadcasted_iota(jnp.int32, (ROWS,), 0), layout.reduce(1))
            return ((index + (unit.first_query + warpgroup * ROWS)) // group).astype(jnp.float32)

        def step(t, carry, *, compare: bool):
            count, o, m, l = carry
            slot = lax.rem(count, stages)
            plgpu.barrier_wait(memory.k_full.at[slot])
            if interpret:
                s = jnp.dot(q_smem[...], memory.k[slot].T, preferred_element_type=jnp.float32)
                visible = memory.visible[slot]
            else:

                def scores(acc):
                    plgpu.wgmma(acc, q_smem, plgpu.transpose_ref(memory.k.at[slot], (1, 0)))
                    return acc[...]

                s = pl.run_scoped(scores, plgpu.ACC((ROWS, tile), jnp.float32))
                visible = plgpu.load(memory.visible.at[slot], (), layout=layout.reduce(0))
            plgpu.barrier_arrive(memory.k_free.at[slot])
            visible = lax.broadcast_in_dim(visible, s.shape, [1])
            if compare:
                s = jnp.where(lanes(token_of_query(), s.shape) + visible >= 0, s * scale, 2 * NEGATIVE)
            else:
                s = s * scale + visible
            m_new = jnp.maximum(m, s.max(axis=1))
            shrink = jnp.exp2(m - m_new)
            weights = jnp.exp2(s - lanes(m_new, s.shape))
            l = l * shrink + weights.sum(axis=1)
            o = o * lanes(shrink, o.shape)
            weights = weights.astype(memory.v.dtype)
            plgpu.barrier_wait(memory.v_full.at[slot])
            if interpret:
                o = o + jnp.dot(weights, memory.v[slot], preferred_element_type=jnp.float32)
            else:
                o = pl.run_state(lambda acc: plgpu.wgmma(acc, weights, memory.v.at[slot]))(plgpu.ACC.init(o))
            plgpu.barrier_arrive(memory.v_free.at[slot])
            return count + 1, o, m_new, l

        carry = (
            count,
            cast(jnp.zeros((ROWS, head_dim), jnp.float32), layout),
            cast(jnp.full((ROWS,), NEGATIVE, jnp.float32), layout.reduce(1)),
            cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1)),
        )
        carry = lax.fori_loop(0, unit.num_plain, functools.partial(step, compare=False), carry)
        if causal:
            carry = lax.fori_loop(unit.num_plain, unit.num_tiles, functools.partial(step, compare=True), carry)
        return carry

    def write(unit: _Unit, o, m, l):
        """Stages the results and copies those of the run's own queries, `chunk` at a time."""
        plgpu.commit_smem()  # no warp still reads the queries that lay here
        o_smem[...] = o
        shape = stats_smem.shape
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        lane = cast(lane, layout)
        m = m * math.log(2)
        stats_smem[...] = jnp.where(lane < shape[1] // 2, lanes(m, shape), lanes(l, shape))
        plgpu.commit_smem()
        num_live = jnp.clip(unit.num_live - warpgroup * ROWS, 0, ROWS)

        def copy(i, carry):
            source = pl.ds(i * chunk, chunk)
            target = pl.ds(unit.out_row + warpgroup * ROWS + i * chunk, chunk)
            plgpu.copy_smem_to_gmem(o_smem.at[source], o_ref.at[unit.head, target])
            plgpu.copy_smem_to_gmem(stats_smem.at[source], stats_ref.at[unit.head, target])
            return carry

        lax.fori_loop(0, num_live // chunk, copy, ())
        plgpu.wait_smem_to_gmem(0)

    def run_unit(i, count):
        unit = read_unit(i)
        has_queries = warpgroup * ROWS < unit.num_live

        @pl.when(has_queries)
        def _():
            _, o, m, l = attend(unit, count)
            write(unit, o, m, l)

        @pl.when(jnp.logical_not(has_queries))
        def _():
            lax.fori_loop(0, unit.num_tiles, lambda t, n: skip(t, n), count)

        return count + unit.num_tiles

    lax.fori_loop(0, num_units, run_unit, jnp.int32(0))
