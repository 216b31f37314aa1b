"""Paged attention on NVIDIA GPUs from compute capability 8.0: Pallas, Triton.

A *run* (adjacent items with the same rows and partial_start) is one list of pages and one contiguous range of
queries of each KV head: readers x T x G. A *window* is a block of at most M of those queries; a *unit* is a window
and a KV head, and each program works through every n-th unit. A unit goes over the run's tokens in tiles of L: page
ids first, then keys and values through pointers made of them, so that a tile may span pages of any size, a part of
one, or pages of several segments. Triton turns these loads into asynchronous copies, a few tiles ahead of the
products. Products are on the matrix units, whose least tile is 16 queries; the softmax is online, in float32. A
run's state stays in registers until its last page and is written once, as a partial a query: `merge` combines them.

Runs with one reader have few queries in decode: they get windows of 16 and a launch of their own, which adds its
partials to those of the wide runs.

A head_dim that is no power of two is cut into pieces that are, as Triton knows no others and padding to 128 would
multiply zeros: 96 is 64 + 32, and 80 is 64 and the last 32, where queries are 0 in the 16 lanes that overlap.

Quantised pages are converted to the queries' dtype as they are; their scales multiply the scores and the weights, one
number a token, not one a lane.

Letters: W items, C pages an item, R rows, T queries a row, H heads, K KV heads, G = H / K, D head dim, N pages of the
store, P positions a page, X partials in all, M queries a window, L tokens a tile.

Source: the online softmax by tiles follows FlashAttention-2 (arXiv 2307.08691).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from apr_kernels.kv_pages import KVPages
from apr_kernels.paged_attention.gpu_merge import merge
from apr_kernels.paged_attention.gpu_triton_windows import PAGE_FIELDS, WINDOW_FIELDS, Prepared, Windows, make_windows
from apr_kernels.paged_attention.gpu_triton_windows import prepare as prepare
from apr_kernels.paged_attention.tuning import MATRIX_ROWS, TritonBlocks, triton_blocks

NEVER = 2**30  # later than any query
NOTHING_SEEN = -1e30  # the running maximum's start: finite, as -inf minus -inf is NaN
MAX_PROGRAMS = 4096  # of a launch: enough to fill any chip several times, few enough that idle ones cost little


class _Partials(NamedTuple):
    """What runs leave: o: f32[K, X * T * G, D]; m, l: f32[K, X * T * G]."""

    o: jax.Array
    m: jax.Array
    l: jax.Array


def paged_attention(q, kv_pages: KVPages, prepared: Prepared, num_queries, *, interpret: bool = False):
    """See `apr_kernels.paged_attention.api.paged_attention`.

    Raises:
      ValueError: the pages of a layer are too many for Pallas' offsets.
    """
    if kv_pages.dtype.itemsize == 1 and 2**31 < kv_pages.k.size <= 2**32:
        raise ValueError(
            f"{kv_pages.k.size} bytes of keys in a layer: Pallas-Triton needs at most {2**31} or over {2**32}"
        )
    num_rows, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_pages.num_kv_heads
    group = num_heads // num_kv_heads
    queries = num_tokens * group  # of a row and KV head
    by_head = q.reshape(num_rows, num_tokens, num_kv_heads, group, head_dim).transpose(2, 0, 1, 3, 4)
    by_head = by_head.reshape(num_kv_heads, num_rows * queries, head_dim)
    num_partials = prepared.partials.size
    partials = None
    for blocks, wide in _launches(q, kv_pages, prepared.any_shared.shape[0], queries):
        windows = make_windows(prepared, num_queries, num_tokens, group, blocks.queries, wide)
        name = "paged_attention" + {True: "_wide", False: "_narrow", None: ""}[wide]
        options = {"blocks": blocks, "interpret": interpret, "name": name}
        partials = _run_kernel(by_head, kv_pages, prepared, windows, partials, num_tokens, group, **options)
    assert partials is not None
    o, m, l = (part.reshape(num_kv_heads, num_partials, queries, *part.shape[2:]) for part in partials)
    return merge(o, m, l, prepared.partials, num_queries, num_tokens, q.dtype, interpret=interpret)


def _launches(q, kv_pages: KVPages, num_shared: int, queries: int) -> list[tuple[TritonBlocks, bool | None]]:
    """Sizes, and whether for runs with several readers, for the others, or for all (None)."""
    most = q.shape[0] * queries if num_shared else queries
    dtype = _compute_dtype(q, kv_pages)
    if queries > MATRIX_ROWS or most <= MATRIX_ROWS:
        return [(triton_blocks(most, kv_pages.head_dim, dtype), None)]
    return [(triton_blocks(n, kv_pages.head_dim, dtype), wide) for n, wide in ((most, True), (queries, False))]


def _compute_dtype(q, kv_pages: KVPages):
    """Of the operands of products."""
    return q.dtype if kv_pages.k_scale is not None else jnp.promote_types(q.dtype, kv_pages.dtype)


def _run_kernel(
    q, kv_pages: KVPages, prepared: Prepared, windows: Windows, partials: _Partials | None, num_tokens: int, group: int,
    *, blocks: TritonBlocks, interpret: bool, name: str,
) -> _Partials:  # fmt: skip
    """Adds to `partials`, in place, those of the windows' runs; None: to uninitialised memory."""
    num_units = windows.table.shape[0] * kv_pages.num_kv_heads
    scales = [] if kv_pages.k_scale is None else [kv_pages.k_scale, kv_pages.v_scale]
    inputs = [windows.table, windows.count, prepared.pages, q, kv_pages.k, kv_pages.v, *scales]
    num_programs = min(num_units, 2 if interpret else MAX_PROGRAMS)
    body = functools.partial(
        paged_attention_kernel,
        causal=num_tokens > 1,
        group=group,
        blocks=blocks,
        dtype=_compute_dtype(q, kv_pages),
        num_programs=num_programs,
        quantised=bool(scales),
    )
    earlier = [] if partials is None else list(partials)
    num_results = prepared.partials.size * num_tokens * group
    shapes = [(*q.shape[:1], num_results, *lanes) for lanes in (q.shape[2:], (), ())]
    call = pl.pallas_call(
        body,
        grid=(num_programs,),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        input_output_aliases={len(inputs) + i: i for i in range(len(earlier))},
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=name,
    )
    return _Partials(*call(*inputs, *earlier))


def paged_attention_kernel(
    windows_ref, count_ref, pages_ref, q_ref, k_ref, v_ref, *refs, num_programs, quantised, **options
):
    """One program: every num_programs-th unit. All arrays are whole, in global memory."""
    scales = refs[:2] if quantised else None
    partials = _Partials(*refs[-3:])
    num_windows, num_kv_heads = count_ref[0], k_ref.shape[0]
    program = pl.program_id(0)

    def unit(i, carry):
        # Windows of a run are neighbours in a head: programs that run together read the same pages.
        unit = program + i * num_programs
        head, window = unit // num_windows, unit % num_windows
        fields = {name: windows_ref[window, at] for at, name in enumerate(WINDOW_FIELDS)}
        _attend(head, fields, pages_ref, q_ref, k_ref, v_ref, scales, partials, **options)
        return carry

    num_units = num_windows * num_kv_heads
    lax.fori_loop(0, (num_units - program + num_programs - 1) // num_programs, unit, 0)


def _attend(head, window, pages_ref, q_ref, k_ref, v_ref, scales, partials, *, causal, group, blocks, dtype):
    """One unit: the window's queries of a head over all tokens of its run."""
    head_dim, page_size, num_pages = q_ref.shape[2], k_ref.shape[2], k_ref.shape[1]
    pieces, own = _pieces(head_dim)
    query = jnp.arange(blocks.queries)
    is_live = query < window["num_live"]
    q_row = window["q_row"] + jnp.minimum(query, window["num_live"] - 1)
    q = [q_ref[head, *_spread([q_row], lanes)].astype(dtype) for lanes in pieces]
    q = [jnp.where(is_own[None, :], a, jnp.zeros_like(a)) for a, is_own in zip(q, own)]
    query_token = (window["first_query"] + query) // group  # t, for a run with a tail: it has one reader
    to_log2 = head_dim**-0.5 * math.log2(math.e)

    def tile(i, state):
        m, l, *o = state
        token = i * blocks.tokens + jnp.arange(blocks.tokens)
        in_run = token < window["num_tokens"]
        # Tokens after the last repeat it: what is read is finite, so weights of 0 hide it, and no load needs a mask.
        token = jnp.minimum(token, window["num_tokens"] - 1)
        place, slot = window["first_page"] + token // page_size, token % page_size
        page, limit, grows = (pages_ref[place, jnp.full_like(place, at)] for at in range(len(PAGE_FIELDS)))
        index = [jnp.clip(page, 0, num_pages - 1), slot]

        k = [k_ref[head, *_spread(index, lanes)].astype(dtype) for lanes in pieces]
        scores = sum(_product(a, b, ((1,), (1,))) for a, b in zip(q, k)) * to_log2
        if scales is not None:
            scores *= scales[0][head, *index][None, :]
        since = jnp.where(slot < limit, 0, jnp.where(grows > 0, slot - limit + 1, NEVER) if causal else NEVER)
        since = jnp.where(in_run, since, NEVER)[None, :]  # the first query that sees the token
        scores = jnp.where(query_token[:, None] >= since if causal else since == 0, scores, -jnp.inf)

        new_m = jnp.maximum(m, scores.max(axis=1))
        shrink = jnp.exp2(m - new_m)
        weights = jnp.exp2(scores - new_m[:, None])
        l = l * shrink + weights.sum(axis=1)
        if scales is not None:
            weights *= scales[1][head, *index][None, :]
        weights = weights.astype(dtype)
        v = [v_ref[head, *_spread(index, lanes)].astype(dtype) for lanes in pieces]
        o = [a * shrink[:, None] + _product(weights, b, ((1,), (0,))) for a, b in zip(o, v)]
        return (new_m, l, *o)

    num_tiles = (jnp.maximum(window["num_tokens"], 0) + blocks.tokens - 1) // blocks.tokens
    zeros = jnp.zeros(blocks.queries, jnp.float32)
    o = [jnp.zeros((blocks.queries, lanes.shape[0]), jnp.float32) for lanes in pieces]
    m, l, *o = lax.fori_loop(0, num_tiles, tile, (zeros + NOTHING_SEEN, zeros, *o))
    out_row = window["out_row"] + query
    plgpu.store(partials.m.at[head, out_row], m * math.log(2), mask=is_live)
    plgpu.store(partials.l.at[head, out_row], l, mask=is_live)
    for piece, lanes, is_own in zip(o, pieces, own):
        at = partials.o.at[head, *_spread([out_row], lanes)]
        plgpu.store(at, piece, mask=is_live[:, None] & is_own[None, :])


def _spread(index, lanes):
    """Indices of lanes of each of n rows: index: a list of i32[n]."""
    shape = (index[0].shape[0], lanes.shape[0])
    return [*(jnp.broadcast_to(each[:, None], shape) for each in index), jnp.broadcast_to(lanes[None, :], shape)]


def _product(a, b, contract):
    """In float32, on operands as they are: float32 ones are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _pieces(head_dim: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Lanes of a head in ranges whose lengths are powers of two, and which of each are in no earlier range.

    No range is shorter than 32 lanes, which four warps can share: the last one reaches back where it has to.
    """
    pieces, own, start = [], [], 0
    while start < head_dim:
        size = max(1 << ((head_dim - start).bit_length() - 1), min(32, head_dim))
        lanes = min(start, head_dim - size) + jnp.arange(size)
        pieces.append(lanes)
        own.append(lanes >= start)
        start += size
    return pieces, own
