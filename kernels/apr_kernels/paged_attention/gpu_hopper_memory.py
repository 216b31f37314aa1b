"""What the warpgroups of the Hopper kernel share: constants, memory, the unit of work.

Letters: G query heads a KV head, D head dim, P positions a page.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from apr_kernels.paged_attention.gpu_hopper_windows import SLAB
from apr_kernels.paged_attention.tuning import HopperBlocks

ROWS = 64  # queries of a consumer: the M of a wgmma
STATS = 8  # lanes a query's maximum and sum take, half each: a copy is 16 bytes at least, a wgmma layout 8 lanes
NEGATIVE = -1e20  # the running maximum's start: far above HIDDEN, so that hidden scores weigh nothing
HIDDEN_SCORE = 2 * NEGATIVE
LAYOUT = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statics:
    """What is known when the kernel is compiled.

    Attributes:
      chunk: queries whose results are copied at once; divides the queries of a row and KV head.
      group: G.
      causal: whether some queries of a row see tokens that others do not.
      page_size: P.
      num_ctas: of the persistent grid.
      interpret: whether the kernel is interpreted; the interpreter knows no layouts and no register operands.
    """

    blocks: HopperBlocks
    chunk: int
    group: int
    causal: bool
    page_size: int
    num_ctas: int
    interpret: bool

    def cast(self, x, layout):
        return x if self.interpret else plgpu.layout_cast(x, layout)


class Memory(NamedTuple):
    """Shared memory and barriers of a CTA; one of each a consumer or a slot of the ring.

    Attributes:
      q_o: queries [consumers, 2, ROWS, D] and, in the same bytes, their results f32[consumers, ROWS, D]: a consumer's
        queries are done with when its results are staged. Hence two times ROWS of half the width.
      stats: f32[consumers, ROWS, STATS]
      k, v: [stages, tile, D]. visible: f32[stages, tile].
      q_full, k_full, v_full: data have come. k_free, v_free: all consumers are done with a slot.
      turn: the two consumers take turns at the tensor cores.
    """

    q_o: Any
    stats: Any
    k: Any
    v: Any
    visible: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any


def memory(statics: Statics, head_dim: int, dtype) -> Memory:
    """What a CTA allocates."""
    blocks = statics.blocks
    consumers, stages, tile = blocks.consumers, blocks.stages, blocks.tile
    swizzle = plgpu.find_swizzle(head_dim * 16)
    tiled = (plgpu.TilingTransform((SLAB, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    copies = max(1, tile // statics.page_size)
    q = plgpu.SMEM((consumers, 2, ROWS, head_dim), dtype, transforms=tiled)
    o = plgpu.SMEM((consumers, ROWS, head_dim), jnp.float32)
    return Memory(
        q_o=(q, o) if statics.interpret else plgpu.RefUnion(q, o),
        stats=plgpu.SMEM((consumers, ROWS, STATS), jnp.float32),
        k=plgpu.SMEM((stages, tile, head_dim), dtype, transforms=tiled),
        v=plgpu.SMEM((stages, tile, head_dim), dtype, transforms=tiled),
        visible=plgpu.SMEM((stages, tile), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=consumers),
        k_full=plgpu.Barrier(num_arrivals=copies + 1, num_barriers=stages),
        v_full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=consumers),
    )


class Unit(NamedTuple):
    """What a CTA works on at a time: a window (see WINDOW_FIELDS for the fields) and the KV head."""

    first_page: Any
    num_pages: Any
    num_tiles: Any
    num_plain: Any
    q_copy: Any
    q_row: Any
    out_row: Any
    num_live: Any
    first_query: Any
    head: Any
