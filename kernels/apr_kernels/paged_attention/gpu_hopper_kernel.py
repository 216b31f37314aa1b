"""The Hopper kernel's CTA, and its producer: the warpgroup that copies. See `gpu_hopper` for the whole.

Letters: K KV heads, D head dim, N pages of the store, P positions a page; S shifted copies of the queries, Q queries a
KV head, Y partial results a KV head; B windows, L pages of all runs.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apr_kernels.kv_pages import NULL_PAGE
from apr_kernels.paged_attention.gpu_hopper_consumer import consume
from apr_kernels.paged_attention.gpu_hopper_memory import Memory, Statics, Unit
from apr_kernels.paged_attention.gpu_hopper_windows import SLAB, WINDOW_FIELDS


def kernel(
    num_units_ref, windows_ref, page_ids_ref, visible_ref, q_ref, k_ref, v_ref, o_ref, stats_ref, memory: Memory,
    *, statics: Statics,
):  # fmt: skip
    """The body of a CTA.

    Args:
      num_units_ref: i32[1] windows times K.
      windows_ref: i32[B * fields].
      page_ids_ref: i32[L]. visible_ref: f32[L * P].
      q_ref: [S, K, Q, D].
      k_ref, v_ref: [K, N, P, D].
      o_ref: f32[K, Y, D]. stats_ref: f32[K, Y, STATS], the maximum in the first half of the lanes, then the sum.
    """
    num_kv_heads, blocks = k_ref.shape[0], statics.blocks
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    num_units = lax.div(num_units_ref[0] - cta + (statics.num_ctas - 1), statics.num_ctas)

    def read_unit(i) -> Unit:
        unit = cta + i * statics.num_ctas
        at = lax.div(unit, num_kv_heads) * len(WINDOW_FIELDS)
        window = {name: windows_ref[at + i] for i, name in enumerate(WINDOW_FIELDS)}
        return Unit(**window, head=lax.rem(unit, num_kv_heads))

    @pl.when(warpgroup < blocks.consumers)
    def _():
        if not statics.interpret:
            plgpu.set_max_registers(blocks.consumer_registers, action="increase")
        consume(read_unit, num_units, warpgroup, q_ref, o_ref, stats_ref, memory, statics)

    @pl.when(warpgroup == blocks.consumers)
    def _():
        if not statics.interpret:
            plgpu.set_max_registers(blocks.producer_registers, action="decrease")
        _produce(read_unit, num_units, page_ids_ref, visible_ref, k_ref, v_ref, memory, statics)


def _produce(read_unit, num_units, page_ids_ref, visible_ref, k_ref, v_ref, memory: Memory, statics: Statics):
    """Fills the ring, tile after tile, unit after unit."""
    tile, stages, page_size = statics.blocks.tile, statics.blocks.stages, statics.page_size
    copies, rows = max(1, tile // page_size), min(tile, page_size)

    def fill(unit: Unit, t, count):
        slot = lax.rem(count, stages)
        ids, offset = [], 0
        for j in range(copies):
            page = t * copies + j if tile >= page_size else lax.div(t, page_size // tile)
            # Past the run's end its last page is read again: its tokens are hidden, but never NaN.
            page_id = page_ids_ref[unit.first_page + jnp.minimum(page, unit.num_pages - 1)]
            ids.append(jnp.minimum(jnp.maximum(page_id, NULL_PAGE), k_ref.shape[1] - 1))
        if tile < page_size:
            offset = lax.rem(t, page_size // tile) * tile

        def copy(source, target, full):
            for j in range(copies):
                positions, place = pl.ds(offset, rows), pl.ds(j * rows, rows)
                plgpu.copy_gmem_to_smem(source.at[unit.head, ids[j], positions], target.at[slot, place], full.at[slot])

        first_token = pl.multiple_of(unit.first_page * page_size + t * tile, SLAB)
        plgpu.barrier_wait(memory.k_free.at[slot])
        plgpu.copy_gmem_to_smem(
            visible_ref.at[pl.ds(first_token, tile)], memory.visible.at[slot], memory.k_full.at[slot]
        )
        copy(k_ref, memory.k, memory.k_full)
        plgpu.barrier_wait(memory.v_free.at[slot])
        copy(v_ref, memory.v, memory.v_full)
        return count + 1

    def fill_unit(i, count):
        unit = read_unit(i)
        return lax.fori_loop(0, unit.num_tiles, lambda t, count: fill(unit, t, count), count)

    count = lax.fori_loop(0, num_units, fill_unit, jnp.int32(0))

    def drain(i, carry):
        slot = lax.rem(count + i, stages)
        plgpu.barrier_wait(memory.k_free.at[slot])
        plgpu.barrier_wait(memory.v_free.at[slot])
        return carry

    lax.fori_loop(0, stages, drain, ())
