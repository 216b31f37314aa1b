"""The Hopper kernel's consumers: the warpgroups that compute. See `gpu_hopper` for the whole.

Letters: D head dim.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apr_kernels.paged_attention.gpu_hopper_memory import (
    HIDDEN_SCORE,
    LAYOUT,
    NEGATIVE,
    ROWS,
    STATS,
    Memory,
    Statics,
    Unit,
)
from apr_kernels.paged_attention.gpu_hopper_windows import SLAB


def consume(read_unit, num_units, warpgroup, q_ref, o_ref, stats_ref, memory: Memory, statics: Statics):
    """Attends ROWS queries of every unit to all of its tiles, and writes their partial results."""
    stages = statics.blocks.stages
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

    def run_unit(i, count):
        unit = read_unit(i)
        has_queries = warpgroup * ROWS < unit.num_live

        @pl.when(has_queries)
        def _():
            o, m, l = _attend(unit, count, warpgroup, q_ref, memory, statics)
            _write(unit, o, m, l, warpgroup, o_ref, stats_ref, memory, statics)

        @pl.when(jnp.logical_not(has_queries))
        def _():
            lax.fori_loop(0, unit.num_tiles, skip, count)

        return count + unit.num_tiles

    lax.fori_loop(0, num_units, run_unit, jnp.int32(0))


def _attend(unit: Unit, count, warpgroup, q_ref, memory: Memory, statics: Statics):
    """The softmax state of a consumer's queries after all tiles; `count` tiles went through the ring before.

    Returns:
      o: f32[ROWS, D] values weighted by 2 ** (score - m), m: f32[ROWS] and l: f32[ROWS] the sum of weights.
    """
    q_smem, _ = memory.q_o
    q_smem, q_full = q_smem.at[warpgroup, 0], memory.q_full.at[warpgroup]
    head_dim, tile, stages = q_ref.shape[-1], statics.blocks.tile, statics.blocks.stages
    scale = math.log2(math.e) * head_dim**-0.5  # scores in powers of two
    row = pl.multiple_of(unit.q_row + warpgroup * ROWS, SLAB)
    plgpu.copy_gmem_to_smem(q_ref.at[unit.q_copy, unit.head, pl.ds(row, ROWS)], q_smem, q_full)
    plgpu.barrier_wait(q_full)

    def lanes(x, shape):
        """One number a query, over all lanes."""
        return lax.broadcast_in_dim(x, shape, [0])

    def when_paired(action):
        """Does what keeps the two consumers apart, where both have queries."""
        if statics.blocks.consumers == 2:
            pl.when(unit.num_live > ROWS)(action)

    def take_turn():
        plgpu.barrier_arrive(memory.turn)
        plgpu.barrier_wait(memory.turn)

    def scores_of(slot):
        if statics.interpret:
            when_paired(take_turn)
            return jnp.dot(q_smem[...], memory.k[slot].T, preferred_element_type=jnp.float32), memory.visible[slot]

        def multiply(acc):
            plgpu.wgmma(acc, q_smem, plgpu.transpose_ref(memory.k.at[slot], (1, 0)))
            when_paired(take_turn)
            return acc[...]

        s = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, tile), jnp.float32))
        return s, plgpu.load(memory.visible.at[slot], (), layout=LAYOUT.reduce(0))

    def add_values(o, weights, slot):
        if statics.interpret:
            return o + jnp.dot(weights, memory.v[slot], preferred_element_type=jnp.float32)
        return pl.run_state(lambda acc: plgpu.wgmma(acc, weights, memory.v.at[slot]))(plgpu.WGMMAAccumulatorRef.init(o))

    def hide(s, visible):
        """Scaled scores, where the query's token has come to the key's; the run then has one reader."""
        index = statics.cast(lax.broadcasted_iota(jnp.int32, (ROWS,), 0), LAYOUT.reduce(1))
        token = lax.div(index + (unit.first_query + warpgroup * ROWS), statics.group).astype(jnp.float32)
        return jnp.where(lanes(token, s.shape) + visible >= 0, s * scale, HIDDEN_SCORE)

    def step(t, carry, *, plain: bool):
        count, o, m, l = carry
        slot = lax.rem(count, stages)
        plgpu.barrier_wait(memory.k_full.at[slot])
        s, visible = scores_of(slot)
        plgpu.barrier_arrive(memory.k_free.at[slot])
        visible = lax.broadcast_in_dim(visible, s.shape, [1])
        s = s * scale + visible if plain else hide(s, visible)
        m_new = jnp.maximum(m, s.max(axis=1))
        shrink = jnp.exp2(m - m_new)
        weights = jnp.exp2(s - lanes(m_new, s.shape))
        l = l * shrink + weights.sum(axis=1)
        o = o * lanes(shrink, o.shape)
        weights = weights.astype(memory.v.dtype)
        # One consumer's softmax runs beside the other's products.
        when_paired(lambda: plgpu.barrier_arrive(memory.turn))
        plgpu.barrier_wait(memory.v_full.at[slot])
        when_paired(lambda: plgpu.barrier_wait(memory.turn))
        o = add_values(o, weights, slot)
        plgpu.barrier_arrive(memory.v_free.at[slot])
        return count + 1, o, m_new, l

    carry = (
        count,
        statics.cast(jnp.zeros((ROWS, head_dim), jnp.float32), LAYOUT),
        statics.cast(jnp.full((ROWS,), NEGATIVE, jnp.float32), LAYOUT.reduce(1)),
        statics.cast(jnp.zeros((ROWS,), jnp.float32), LAYOUT.reduce(1)),
    )
    pl.when((warpgroup == 1) & (unit.num_live > ROWS))(take_turn)
    carry = lax.fori_loop(0, unit.num_plain, lambda t, carry: step(t, carry, plain=True), carry)
    if statics.causal:
        carry = lax.fori_loop(unit.num_plain, unit.num_tiles, lambda t, carry: step(t, carry, plain=False), carry)
    pl.when((warpgroup == 0) & (unit.num_live > ROWS))(take_turn)
    return carry[1:]


def _write(unit: Unit, o, m, l, warpgroup, o_ref, stats_ref, memory: Memory, statics: Statics):
    """Stages the results and copies those of the run's own queries, `chunk` at a time."""
    _, o_smem = memory.q_o
    o_smem, stats_smem = o_smem.at[warpgroup], memory.stats.at[warpgroup]
    chunk, shape = statics.chunk, (ROWS, STATS)
    plgpu.commit_smem()  # no warp still reads the queries that lay here
    o_smem[...] = o
    lane = statics.cast(lax.broadcasted_iota(jnp.int32, shape, 1), LAYOUT)
    m, l = (lax.broadcast_in_dim(x, shape, [0]) for x in (m * math.log(2), l))
    stats_smem[...] = jnp.where(lane < STATS // 2, m, l)
    plgpu.commit_smem()
    num_live = jnp.minimum(unit.num_live - warpgroup * ROWS, ROWS)

    def copy(i, carry):
        source, target = pl.ds(i * chunk, chunk), pl.ds(unit.out_row + warpgroup * ROWS + i * chunk, chunk)
        plgpu.copy_smem_to_gmem(o_smem.at[source], o_ref.at[unit.head, target])
        plgpu.copy_smem_to_gmem(stats_smem.at[source], stats_ref.at[unit.head, target])
        return carry

    lax.fori_loop(0, lax.div(num_live, chunk), copy, ())
    plgpu.wait_smem_to_gmem(0)
