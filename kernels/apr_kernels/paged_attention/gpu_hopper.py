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

It is built for two limits. Many readers of one prefix are bound by the tensor cores (256 queries of a KV head make 256
flop a byte): hence wgmmas of 64 full rows, 128 queries a tile from the L2 cache, and two consumers that take turns, one
in its softmax while the other multiplies. Unrelated sequences are bound by memory and pad their few queries to 64 rows:
by instruction counts that takes one consumer some 70% of the time in which a tile arrives. One launch serves both.

A run's softmax state is kept in registers until its last page and written once, as a partial a query; a second kernel
merges them (`gpu_hopper_merge`; in XLA for head dims that do not fill a warpgroup).

What tokens a query sees is one number a token, prepared once a step for all layers: 0 (all queries), -t (queries from t
on) or HIDDEN. Added to the scaled scores it masks at no cost, as the addend of a fused multiply-add; only tiles with a
token that some queries may not see yet need a comparison.

Files: `gpu_hopper_windows` (what is prepared), `gpu_hopper_memory` (what warpgroups share), `gpu_hopper_kernel` (a CTA,
and its producer), `gpu_hopper_consumer`, `gpu_hopper_merge`. Block sizes are in `tuning`.

Letters: R rows, T queries a row, H heads, K KV heads, G = H / K, D head dim.

Source: the warp specialisation follows FlashAttention-3 (arXiv 2407.08608).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from apr_kernels.kv_pages import KVPages
from apr_kernels.paged_attention import gpu_hopper_merge
from apr_kernels.paged_attention.gpu_hopper_kernel import kernel
from apr_kernels.paged_attention.gpu_hopper_memory import ROWS, STATS, Statics, memory
from apr_kernels.paged_attention.gpu_hopper_windows import SLAB, Prepared, make_windows
from apr_kernels.paged_attention.gpu_hopper_windows import prepare as prepare
from apr_kernels.paged_attention.merge import merge
from apr_kernels.paged_attention.tuning import hopper_blocks


def paged_attention(q, kv_pages: KVPages, prepared: Prepared, num_queries, *, interpret: bool = False):
    """See `apr_kernels.paged_attention.api.paged_attention`."""
    _, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_pages.num_kv_heads
    group = num_heads // num_kv_heads
    blocks = hopper_blocks(head_dim)
    queries = num_tokens * group  # of a row and KV head
    windows, num_windows = make_windows(prepared, queries, group, blocks.consumers * ROWS, blocks.tile, num_tokens)
    num_partials = prepared.partials.shape[0] * prepared.partials.shape[1]
    statics = Statics(
        blocks=blocks,
        chunk=math.gcd(queries, ROWS),
        group=group,
        causal=num_tokens > 1,
        page_size=kv_pages.page_size,
        num_ctas=2 if interpret else blocks.ctas,
        interpret=interpret,
    )
    run = plgpu.kernel(
        functools.partial(kernel, statics=statics),
        out_type=[
            jax.ShapeDtypeStruct((num_kv_heads, num_partials * queries, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_kv_heads, num_partials * queries, STATS), jnp.float32),
        ],
        scratch_types=[memory(statics, head_dim, kv_pages.dtype)],
        grid=(statics.num_ctas,),
        grid_names=("cta",),
        num_threads=blocks.consumers + 1,
        thread_name="warpgroup",
        interpret=interpreter(interpret),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    num_units = (num_windows * num_kv_heads).reshape(1)
    shifted = _shifted_queries(q.astype(kv_pages.dtype), num_kv_heads, blocks.consumers * ROWS)
    o, stats = run(num_units, windows, prepared.page_ids, prepared.visible, shifted, kv_pages.k, kv_pages.v)
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


def interpreter(interpret: bool):
    """The `interpret` of a Mosaic GPU kernel."""
    if not interpret:
        return None
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from 0.11 on

    return InterpretGPUParams()
