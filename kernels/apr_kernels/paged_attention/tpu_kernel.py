"""The body of the TPU's attention kernel; `tpu.py` says how it works and explains the letters."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from apr_kernels.kv_pages import LANES

ALIGN = 16  # rows: a register of bf16 holds 16
CHUNK = 8 * LANES  # integers of page metadata copied to SMEM at once: one tile of 32-bit numbers
NEVER = 2**30  # a row from which on a token would be visible; there is none
LOWEST = -1e30  # the maximum of a query that has seen nothing; a masked score is lower still, so that it weighs 0
MASKED = -3e38


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is static.

    Attributes:
      heads: KV heads a grid step takes.
      window: queries of a KV head a grid step takes.
      block_pages: pages a block; a divisor of item_pages.
      buffers: blocks in VMEM at once; all but one are on their way.
      item_pages: C. item_stride: integers an item has in a chunk.
      group: G. row_queries: T * G.
      num_pages: N. page_size: P.
      dtype: of the operands of both products. scale: of the scores.
      has_values: values lie in an array of their own. has_scales: pages are quantised.
    """

    heads: int
    window: int
    block_pages: int
    buffers: int
    item_pages: int
    item_stride: int
    group: int
    row_queries: int
    num_pages: int
    page_size: int
    dtype: Any
    scale: float
    has_values: bool
    has_scales: bool

    @property
    def block_tokens(self) -> int:
        return self.block_pages * self.page_size

    @property
    def item_blocks(self) -> int:
        return self.item_pages // self.block_pages

    @property
    def chunk_items(self) -> int:
        return CHUNK // self.item_stride


class Step(NamedTuple):
    """What a grid step works with: the kernel's references, and where it stands.

    Attributes:
      first_head, window_begin: the first of its heads, and of its queries of each.
      ranges: SMEM i32[4 * windows] the items [first, last) of each window's two parts.
      lo, hi, growth: SMEM i32[W], see `tpu.Prepared`.
      q: VMEM [heads, window, L].
      item_pages: HBM, chunks of page ids and limits.
      stores: HBM, the arrays of the page store: k, v if has_values, scales if has_scales.
      o: VMEM [heads, window, L]. lse: VMEM f32[heads, 1, window / LANES, LANES].
      chunks: SMEM i32[2, CHUNK / LANES, LANES].
      buffers: VMEM [buffers, heads, block_pages, ...] for each of stores.
      acc: VMEM f32[heads, window, L]. m, l: VMEM f32[heads, window, LANES], equal in all lanes.
      page_sem: one a buffer. chunk_sem: one a chunk.
    """

    first_head: Any
    window_begin: Any
    ranges: Any
    lo: Any
    hi: Any
    growth: Any
    q: Any
    item_pages: Any
    stores: tuple
    o: Any
    lse: Any
    chunks: Any
    buffers: tuple
    acc: Any
    m: Any
    l: Any
    page_sem: Any
    chunk_sem: Any


class _Block(NamedTuple):
    """A block of an item, as a window sees it.

    Attributes:
      w: the item. page: the first of its pages in the item. slot: its buffer.
      origin: the first query of the item's first reader.
      begin, end: the window's queries that read it, counted from the first row's; none where begin >= end.
      growth: of the item. last_growth: the most that any query of the window sees beyond query 0.
    """

    w: Any
    page: Any
    slot: Any
    origin: Any
    begin: Any
    end: Any
    growth: Any
    last_growth: Any


def kernel(*refs, sizes: Sizes):
    """A grid step: KV heads [i * heads, ...) and the window j of queries."""
    grid = _group(refs, sizes)
    ranges = 4 * pl.program_id(1)
    grid.acc[...] = jnp.zeros_like(grid.acc)
    grid.m[...] = jnp.full_like(grid.m, LOWEST)
    grid.l[...] = jnp.zeros_like(grid.l)

    def part(i, _):
        first, last = (grid.ranges[ranges + 2 * i + j] for j in range(2))
        pl.when(first < last)(lambda: _read_items(grid, sizes, first, last))

    lax.fori_loop(0, 2, part, None)
    _finish(grid, sizes)


def _group(refs, sizes: Sizes) -> Step:
    num_stores = 1 + sizes.has_values + sizes.has_scales
    ranges, lo, hi, growth, q, item_pages, *rest = refs
    stores, rest = rest[:num_stores], rest[num_stores:]
    o, lse, chunks, *rest = rest
    return Step(
        pl.program_id(0) * sizes.heads,
        pl.program_id(1) * sizes.window,
        *(ranges, lo, hi, growth, q, item_pages, tuple(stores)),
        *(o, lse, chunks, tuple(rest[:num_stores])),
        *rest[num_stores:],
    )


def _read_items(grid: Step, sizes: Sizes, first, last):
    """Attends to the items [first, last): fetches blocks ahead, and chunks of page ids ahead of these."""
    ahead = sizes.buffers - 1
    num_blocks = (last - first) * sizes.item_blocks
    last_chunk = lax.div(last - 1, sizes.chunk_items)

    def copy_chunk(chunk):
        slot = lax.rem(chunk, 2)
        return pltpu.make_async_copy(grid.item_pages.at[chunk], grid.chunks.at[slot], grid.chunk_sem.at[slot])

    def enters(block: _Block):
        """Whether a block is the first of a chunk."""
        return (block.page == 0) & ((lax.rem(block.w, sizes.chunk_items) == 0) | (block.w == first))

    def fetch(i, _=None):
        block = _block(grid, sizes, first, i)
        pl.when(enters(block))(lambda: copy_chunk(lax.div(block.w, sizes.chunk_items)).wait())
        pl.when(_any_visible(grid, sizes, block))(lambda: _fetch_pages(grid, sizes, block))

    def step(i, _):
        block = _block(grid, sizes, first, i)
        chunk = lax.div(block.w, sizes.chunk_items) + 1
        # Here the chunk before this block's is done with; its place takes the chunk after it.
        pl.when(enters(block) & (chunk <= last_chunk) & (i > 0))(lambda: copy_chunk(chunk).start())
        pl.when(i + ahead < num_blocks)(lambda: fetch(i + ahead))
        pl.when(_any_visible(grid, sizes, block))(lambda: _attend(grid, sizes, block))

    first_chunk = lax.div(first, sizes.chunk_items)
    copy_chunk(first_chunk).start()
    pl.when(first_chunk < last_chunk)(lambda: copy_chunk(first_chunk + 1).start())
    lax.fori_loop(0, jnp.minimum(ahead, num_blocks), fetch, None)
    lax.fori_loop(0, num_blocks, step, None)


def _block(grid: Step, sizes: Sizes, first, i) -> _Block:
    """Block i of the items from `first` on."""
    w = first + lax.div(i, sizes.item_blocks)
    origin = grid.lo[w] * sizes.row_queries
    begin = jnp.maximum(origin, grid.window_begin)
    end = jnp.minimum(grid.hi[w] * sizes.row_queries, grid.window_begin + sizes.window)
    growth = grid.growth[w]
    last_token = lax.div(jnp.maximum(end - 1 - origin, 0), sizes.group)
    return _Block(
        w=w,
        page=lax.rem(i, sizes.item_blocks) * sizes.block_pages,
        slot=lax.rem(i, sizes.buffers),
        origin=origin,
        begin=begin,
        end=end,
        growth=growth,
        last_growth=jnp.minimum(growth, last_token),
    )


def _item_integer(grid: Step, sizes: Sizes, w, i):
    """Integer i of item w in its chunk."""
    at = lax.rem(w, sizes.chunk_items) * sizes.item_stride + i
    return grid.chunks[lax.rem(lax.div(w, sizes.chunk_items), 2), lax.div(at, LANES), lax.rem(at, LANES)]


def _limit(grid: Step, sizes: Sizes, block: _Block, page):
    """How many slots of the block's page query 0 of the reader sees."""
    return _item_integer(grid, sizes, block.w, sizes.item_pages + block.page + page)


def _is_visible(grid: Step, sizes: Sizes, block: _Block, page):
    """Whether any query of the window sees anything in the block's page."""
    return (block.begin < block.end) & (_limit(grid, sizes, block, page) + block.last_growth > 0)


def _any_visible(grid: Step, sizes: Sizes, block: _Block):
    pages = [_is_visible(grid, sizes, block, page) for page in range(sizes.block_pages)]
    found = pages[0]
    for page in pages[1:]:
        found |= page
    return found


def _page_copies(grid: Step, sizes: Sizes, block: _Block, page):
    """The copies of one page, all heads of the grid step at once."""
    page_id = _item_integer(grid, sizes, block.w, block.page + page)
    page_id = jnp.clip(page_id, 0, sizes.num_pages - 1)  # a read out of bounds would halt the core
    heads = pl.ds(grid.first_head, sizes.heads)
    return [
        pltpu.make_async_copy(
            store.at[heads, page_id], buffer.at[block.slot, :, page], grid.page_sem.at[block.slot]
        )
        for store, buffer in zip(grid.stores, grid.buffers)
    ]  # fmt: skip


def _fetch_pages(grid: Step, sizes: Sizes, block: _Block):
    """Starts the copies of the visible pages; zeroes the values of the others, as 0 x NaN would spoil the sum."""

    def page(i, _):
        visible = _is_visible(grid, sizes, block, i)

        @pl.when(visible)
        def _():
            for copy in _page_copies(grid, sizes, block, i):
                copy.start()

        @pl.when(~visible)
        def _():
            for buffer in grid.buffers[sizes.has_values :]:  # the values, or what holds them, and the scales
                buffer[block.slot, :, i] = jnp.zeros_like(buffer[block.slot, :, i])

    lax.fori_loop(0, sizes.block_pages, page, None)


def _attend(grid: Step, sizes: Sizes, block: _Block):
    """Waits for a block and adds it to the state of all queries of the window that read it."""

    def wait(i, _):
        @pl.when(_is_visible(grid, sizes, block, i))
        def _():
            for copy in _page_copies(grid, sizes, block, i):
                copy.wait()

    lax.fori_loop(0, sizes.block_pages, wait, None)
    from_row = _visible_from(grid, sizes, block)
    begin = lax.div(block.begin - grid.window_begin, ALIGN) * ALIGN
    count = block.end - grid.window_begin - begin
    tiles = [tile for tile in (ALIGN, 4 * ALIGN, LANES) if tile <= sizes.window]
    for i, tile in enumerate(tiles):
        fits = (count > tiles[i - 1]) if i else True
        if tile != tiles[-1]:
            fits &= count <= tile
        pl.when(fits)(lambda tile=tile: _attend_tiles(grid, sizes, block, from_row, begin, count, tile))


def _visible_from(grid: Step, sizes: Sizes, block: _Block):
    """i32[1, tokens]: the row, among all rows of queries, from which on each token of the block is visible."""
    token = lax.broadcasted_iota(jnp.int32, (1, sizes.block_tokens), 1)
    limit = jnp.full_like(token, _limit(grid, sizes, block, 0))
    for page in range(1, sizes.block_pages):
        limit = jnp.where(token >= page * sizes.page_size, _limit(grid, sizes, block, page), limit)
    query = lax.rem(token, sizes.page_size) + 1 - limit  # the first query that sees the token
    row = block.origin + jnp.maximum(query, 0) * sizes.group
    return jnp.where(query <= block.growth, jnp.maximum(row, block.begin), NEVER)


def _attend_tiles(grid: Step, sizes: Sizes, block: _Block, from_row, begin, count, tile: int):
    """Takes `count` queries of every head from row `begin` of the window on, a tile at a time."""

    def step(i, _):
        nominal = begin + i * tile
        start = pl.multiple_of(jnp.minimum(nominal, sizes.window - tile), ALIGN)  # rows before nominal are done
        row = grid.window_begin + start + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        visible = (row >= jnp.maximum(from_row, grid.window_begin + nominal)) & (row < block.end)
        for head in range(sizes.heads):
            _attend_head(grid, sizes, block.slot, head, pl.ds(start, tile), visible)

    lax.fori_loop(0, lax.div(count + tile - 1, tile), step, None)


def _attend_head(grid: Step, sizes: Sizes, slot, head: int, rows, visible):
    """One product of a tile of queries and a block of keys, one step of the softmax, one product with values."""
    precision = lax.Precision.HIGHEST if sizes.dtype == jnp.float32 else lax.Precision.DEFAULT
    k = _load(grid.buffers[0], sizes, slot, head)
    v = _load(grid.buffers[1], sizes, slot, head) if sizes.has_values else k
    scores = lax.dot_general(
        grid.q[head, rows], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=precision
    )
    scale = sizes.scale
    if sizes.has_scales:
        scales = grid.buffers[-1][slot, head, :, 0]  # [block_pages, lanes]
        scale *= _by_token(scales, 0, sizes)
    scores = jnp.where(visible, scores * scale, MASKED)
    m = grid.m[head, rows]
    new_m = jnp.maximum(m, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - new_m[:, :1])
    shrink = jnp.exp(m - new_m)
    grid.m[head, rows] = new_m
    grid.l[head, rows] = grid.l[head, rows] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    if sizes.has_scales:
        weights *= _by_token(scales, scales.shape[1] // 2, sizes)
    out = lax.dot_general(
        weights.astype(sizes.dtype), v, (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32, precision=precision,
    )  # fmt: skip
    grid.acc[head, rows] = grid.acc[head, rows] * shrink[:, :1] + out


def _load(buffer, sizes: Sizes, slot, head: int):
    """The block's keys or values of one head: [tokens, L]."""
    pages = buffer[slot, head]
    rows = 8 * 4 // pages.dtype.itemsize  # of a register of this dtype
    if sizes.page_size % rows:
        pages = pages.astype(jnp.float32)  # pages are whole registers only in 32 bits
    return pages.reshape(sizes.block_tokens, pages.shape[-1]).astype(sizes.dtype)


def _by_token(scales, first: int, sizes: Sizes):
    """Lanes [first, first + P) of each page's scales: [pages, lanes], as a row of the block's tokens: f32[1, tokens].

    Each page's scales are repeated over all lanes; then a token takes those of its own page.
    """
    size, lanes = sizes.page_size, LANES
    scales = scales[:, first // lanes * lanes : first // lanes * lanes + lanes]
    lane = lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    scales = jnp.where((lane >= first % lanes) & (lane < first % lanes + size), scales, 0)
    shift = size
    while shift < lanes:
        scales += pltpu.roll(scales, shift, 1)
        shift *= 2
    scales = jnp.concatenate([scales] * -(-sizes.block_tokens // lanes), axis=1)[:, : sizes.block_tokens]
    token = lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    page = lax.broadcasted_iota(jnp.int32, scales.shape, 0)
    return jnp.sum(jnp.where(lax.div(token, size) == page, scales, 0), axis=0, keepdims=True)


def _finish(grid: Step, sizes: Sizes):
    """Divides by the sums; a tile's logarithms, equal in all lanes, become one row by way of its diagonal."""
    diagonal = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) == lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)

    def tile(i, _):
        rows = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        for head in range(sizes.heads):
            l = grid.l[head, rows]
            sees = l > 0
            safe = jnp.where(sees, l, 1)
            o = jnp.where(sees[:, :1], grid.acc[head, rows] / safe[:, :1], 0)
            grid.o[head, rows] = o.astype(grid.o.dtype)
            lse = jnp.where(sees, grid.m[head, rows] + jnp.log(safe), -jnp.inf)
            grid.lse[head, 0, pl.ds(i, 1)] = jnp.sum(jnp.where(diagonal, lse, 0), axis=0, keepdims=True)

    lax.fori_loop(0, sizes.window // LANES, tile, None)
