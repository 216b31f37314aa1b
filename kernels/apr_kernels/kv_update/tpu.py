"""Writes new keys and values into pages on TPUs: Pallas, Mosaic TPU, in place.

XLA's scatter copies the whole store on TPUs; this kernel gets it as an aliased operand and moves by asynchronous
copies only what it changes. The unit is a page and all tokens it takes in this call, so that tokens of one page
cannot overwrite each other. A copy moves whole registers' worth of rows, not single tokens: the rows that hold the
new tokens are read, changed in VMEM and written back, all units' copies overlapping in a ring of buffers. A page
that is begun is not read: its other slots are written as zeros.

In decode a row brings one token, and all of them lie in VMEM from the start. In prefill XLA lays the tokens out in
the slots of their pages first, which is nearly free as most pages are whole, and the kernel copies them by page.

Letters: R rows, T tokens a row, J pages that T tokens may touch, E = R * J units, K KV heads, N pages, P positions
a page, D head dim, L lanes of a stored token, S lanes of a page's scales.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from apr_kernels.kv_pages import LANE_PACKED, NULL_PAGE, KVPages, is_quantised, lane_scales, quantise
from apr_kernels.plan import Plan

MAX_BUFFERS = 16
BUFFER_BYTES = 6 << 20  # of VMEM for the ring; with the new tokens of decode it stays under every TPU's 16 MiB


class Prepared(NamedTuple):
    """The units: row r's pages are units [r * J, (r + 1) * J).

    Attributes:
      page_ids: i32[E] the page; the null page where nothing is written.
      lo, hi: i32[E] the slots that take new tokens.
      first: i32[E] index among all R * T tokens of the one that slot 0 would take; may be out of range.
    """

    page_ids: jax.Array
    lo: jax.Array
    hi: jax.Array
    first: jax.Array


def prepare(plan: Plan, tail_len, num_queries, num_tokens: int, page_size: int, num_pages: int) -> Prepared:
    """See `apr_kernels.kv_update.api.prepare`."""
    touched = 1 if num_tokens == 1 else (num_tokens + page_size - 2) // page_size + 1  # J
    start = tail_len.at[plan.row_slot].get(mode="fill", fill_value=0)[:, None]  # [R, 1]
    page_idx = start // page_size + jnp.arange(touched)  # [R, J]
    page_ids = plan.tail_pages.at[plan.row_slot[:, None], page_idx].get(mode="fill", fill_value=NULL_PAGE)
    lo = jnp.maximum(start - page_idx * page_size, 0)
    hi = jnp.minimum(start + num_queries[:, None] - page_idx * page_size, page_size)
    page_ids = jnp.where((lo < hi) & (page_ids > NULL_PAGE) & (page_ids < num_pages), page_ids, NULL_PAGE)
    first = jnp.arange(plan.num_rows)[:, None] * num_tokens + page_idx * page_size - start
    return Prepared(*(array.reshape(-1).astype(jnp.int32) for array in (page_ids, lo, hi, first)))


def kv_update(kv_pages: KVPages, k, v, prepared: Prepared, *, interpret: Any = False) -> KVPages:
    """See `apr_kernels.kv_update.api.kv_update`. `interpret` may be a `pltpu.InterpretParams`."""
    names = [name for name in ("k", "v", "k_scale") if getattr(kv_pages, name) is not None]
    stores = [getattr(kv_pages, name) for name in names]
    written = _call(stores, _new(kv_pages, k, v, prepared), prepared, k.shape[1] == 1, interpret)
    return dataclasses.replace(kv_pages, **dict(zip(names, written)))


def _new(kv_pages: KVPages, k, v, prepared: Prepared) -> list[jax.Array]:
    """The new tokens for each array of the store.

    Returns:
      Arrays [R, K, 1, ...] of 32-bit numbers where T is 1: a row's token, its scales repeated over their lanes; else
      arrays [K, E, rows, ...] of the store's dtype: units in the layout of pages.
    """
    page_size, width, dtype = kv_pages.page_size, kv_pages.k.shape[-1], kv_pages.dtype
    in_pages = k.shape[1] > 1
    if in_pages:
        token = jnp.clip(prepared.first[:, None] + jnp.arange(page_size), 0, k.shape[0] * k.shape[1] - 1)

    def place(x):
        """[R, T, K, ...] as [K, E, P, ...], or [R, K, 1, ...] where T is 1."""
        if not in_pages:
            return jnp.moveaxis(x, 1, 2)
        return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[token], 2, 0)

    scales = []
    if is_quantised(dtype):
        (k, k_scale), (v, v_scale) = quantise(k, dtype), quantise(v, dtype)
        k_scale, v_scale = place(k_scale), place(v_scale)
        if not in_pages:
            k_scale, v_scale = (jnp.broadcast_to(x, (*x.shape[:-1], page_size)) for x in (k_scale, v_scale))
        scales = [lane_scales(k_scale, v_scale)[..., None, :]]
    tokens = [jnp.concatenate([k, v], -1)] if kv_pages.format == LANE_PACKED else [k, v]
    tokens = [place(x.astype(dtype)) for x in tokens]
    tokens = [jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in tokens]
    if not in_pages:
        tokens = [x.astype(_wide(dtype)) for x in tokens]
    return tokens + scales


def _wide(dtype):
    """A 32-bit type that holds all numbers of a dtype: selects by row need one."""
    return jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What is static.

    Attributes:
      heads: KV heads a grid step takes. units: E. buffers: units in VMEM at once.
      page_rows: rows of a page in each array of the store: P, or 1 for scales.
      copy_rows: rows that are copied at once, of each: a divisor of page_rows.
      num_pages: N. page_size: P.
      in_pages: new tokens come in the layout of pages.
    """

    heads: int
    units: int
    buffers: int
    page_rows: tuple[int, ...]
    copy_rows: tuple[int, ...]
    num_pages: int
    page_size: int
    in_pages: bool


def _call(stores, new, prepared: Prepared, one_token: bool, interpret):
    num_kv_heads, num_pages, page_size, _ = stores[0].shape
    page_bytes = sum(store[0, 0].size * store.dtype.itemsize for store in stores) * (1 if one_token else 2)
    heads = max(
        n
        for n in range(1, num_kv_heads + 1)
        if num_kv_heads % n == 0 and (n == 1 or 2 * n * page_bytes <= BUFFER_BYTES)
    )
    rows = [store.shape[2] for store in stores]
    sizes = _Sizes(
        heads=heads,
        units=prepared.page_ids.shape[0],
        buffers=max(2, min(MAX_BUFFERS, BUFFER_BYTES // (heads * page_bytes))),
        page_rows=tuple(rows),
        copy_rows=tuple(min(n, 32 // store.dtype.itemsize) for n, store in zip(rows, stores)),
        num_pages=num_pages,
        page_size=page_size,
        in_pages=not one_token,
    )
    if one_token:
        specs = [pl.BlockSpec((x.shape[0], heads, *x.shape[2:]), lambda i, *_: (0, i, 0, 0)) for x in new]
    else:
        specs = [pl.BlockSpec(memory_space=pl.ANY)] * len(new)
    buffers = [pltpu.VMEM((sizes.buffers, heads, *store.shape[2:]), store.dtype) for store in stores]
    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_kv_heads // heads,),
            in_specs=[*specs, *[pl.BlockSpec(memory_space=pl.ANY)] * len(stores)],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(stores),
            scratch_shapes=[
                *buffers,
                *(buffers if sizes.in_pages else []),
                pltpu.SemaphoreType.DMA((sizes.buffers,)),
                pltpu.SemaphoreType.DMA((sizes.buffers,)),
            ],
        ),
        # In HBM, and the stores with it: XLA would move a small store to VMEM and back at every call.
        out_shape=[(jax.ShapeDtypeStruct if interpret else pltpu.HBM)(store.shape, store.dtype) for store in stores],
        input_output_aliases={4 + len(new) + i: i for i in range(len(stores))},
        interpret=interpret,
        name="kv_update",
    )(*prepared, *new, *stores)


class _Step(NamedTuple):
    """What a grid step works with.

    Attributes:
      first_head: of its heads.
      page_ids, lo, hi: SMEM, see `Prepared`.
      new: VMEM or HBM, the new tokens for each of stores.
      stores: HBM.
      old: VMEM [buffers, heads, rows, ...] a unit's rows, changed in place.
      placed: VMEM, as old: a unit's new tokens, if in_pages.
      read_sem, write_sem: one a buffer.
    """

    first_head: Any
    page_ids: Any
    lo: Any
    hi: Any
    new: Any
    stores: Any
    old: Any
    placed: Any
    read_sem: Any
    write_sem: Any


def _kernel(page_ids, lo, hi, _, *refs, sizes: _Sizes):
    count = len(sizes.page_rows)
    new, stores, refs = refs[:count], refs[2 * count : 3 * count], refs[3 * count :]  # inputs, aliased, are not used
    old, refs = refs[:count], refs[count:]
    placed = refs[:-2]
    step = _Step(pl.program_id(0) * sizes.heads, page_ids, lo, hi, new, stores, old, placed, *refs[-2:])
    ahead = sizes.buffers // 2

    def start_reads(i, _=None):
        _reads(step, sizes, i, "start")

    def unit(i, _):
        behind = i + ahead - sizes.buffers  # its buffer is the one that is read into next
        pl.when(behind >= 0)(lambda: _writes(step, sizes, behind, "wait"))
        pl.when(i + ahead < sizes.units)(lambda: start_reads(i + ahead))
        _reads(step, sizes, i, "wait")
        _change(step, sizes, i)
        _writes(step, sizes, i, "start")

    def wait_for_writes(i, _):
        _writes(step, sizes, i, "wait")

    lax.fori_loop(0, min(ahead, sizes.units), start_reads, None)
    lax.fori_loop(0, sizes.units, unit, None)
    lax.fori_loop(max(0, sizes.units + ahead - sizes.buffers), sizes.units, wait_for_writes, None)


def _copies(step: _Step, sizes: _Sizes, unit, store: int, page):
    """Rows of a page in the store and in the unit's buffer."""
    heads = pl.ds(step.first_head, sizes.heads)
    page_id = jnp.clip(step.page_ids[unit], 0, sizes.num_pages - 1)  # out of bounds would halt the core
    rows = sizes.copy_rows[store]
    rows = pl.ds(pl.multiple_of(page * rows, rows), rows)
    return step.stores[store].at[heads, page_id, rows], step.old[store].at[lax.rem(unit, sizes.buffers), :, rows]


def _touched(step: _Step, sizes: _Sizes, unit, store: int, whole):
    """The copies [first, last) that the unit's tokens touch; all of the page's if `whole`."""
    rows, copy_rows = sizes.page_rows[store], sizes.copy_rows[store]
    if rows != sizes.page_size or rows == copy_rows:
        return 0, rows // copy_rows
    first = jnp.where(whole, 0, lax.div(step.lo[unit], copy_rows))
    return first, jnp.where(whole, rows // copy_rows, lax.div(step.hi[unit] + copy_rows - 1, copy_rows))


def _reads(step: _Step, sizes: _Sizes, unit, action: str):
    """Starts the copies into the unit's buffer, or waits for them: its old rows, unless it is begun, and new ones."""
    slot = lax.rem(unit, sizes.buffers)
    is_used = step.page_ids[unit] != NULL_PAGE

    @pl.when(is_used & (step.lo[unit] > 0))
    def _():
        for store in range(len(step.stores)):

            def copy(i, _, store=store):
                source, target = _copies(step, sizes, unit, store, i)
                getattr(pltpu.make_async_copy(source, target, step.read_sem.at[slot]), action)()

            lax.fori_loop(*_touched(step, sizes, unit, store, False), copy, None)

    @pl.when(is_used)
    def _():
        for new, placed in zip(step.new, step.placed):
            source = new.at[pl.ds(step.first_head, sizes.heads), unit]
            getattr(pltpu.make_async_copy(source, placed.at[slot], step.read_sem.at[slot]), action)()


def _writes(step: _Step, sizes: _Sizes, unit, action: str):
    """Starts the copies back to the store, or waits for them."""

    @pl.when(step.page_ids[unit] != NULL_PAGE)
    def _():
        for store in range(len(step.stores)):

            def copy(i, _, store=store):
                target, source = _copies(step, sizes, unit, store, i)
                sem = step.write_sem.at[lax.rem(unit, sizes.buffers)]
                getattr(pltpu.make_async_copy(source, target, sem), action)()

            lax.fori_loop(*_touched(step, sizes, unit, store, step.lo[unit] == 0), copy, None)


def _change(step: _Step, sizes: _Sizes, unit):
    """Puts the new tokens in their slots of the unit's buffer, zeros in the others of a page that is begun."""
    lo, hi = step.lo[unit], step.hi[unit]
    slot = lax.rem(unit, sizes.buffers)

    def rows(i, _, store: int):
        old, copy_rows = step.old[store], sizes.copy_rows[store]
        at = (slot, slice(None), pl.ds(pl.multiple_of(i * copy_rows, copy_rows), copy_rows))
        before = old[at]
        wide = _wide(before.dtype)
        shape = (1, *before.shape[1:])
        if sizes.page_rows[store] == sizes.page_size:
            position = i * copy_rows + lax.broadcasted_iota(jnp.int32, shape, 1)
        else:  # scales: a lane a token, keys' before values'
            position = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 2), shape[2] // 2)
        after = step.placed[store][at] if sizes.in_pages else step.new[store][unit]
        kept = jnp.where(lo == 0, jnp.zeros(before.shape, wide), before.astype(wide))
        is_new = (position >= lo) & (position < hi)
        old[at] = jnp.where(is_new, after.astype(wide), kept).astype(before.dtype)

    @pl.when(step.page_ids[unit] != NULL_PAGE)
    def _():
        for store in range(len(step.stores)):
            change = functools.partial(rows, store=store)
            lax.fori_loop(*_touched(step, sizes, unit, store, lo == 0), change, None)
