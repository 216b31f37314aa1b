"""JAX's public paged attention, on the same stores and pages, as a baseline of `benchmark_kernels.py`.

Letters: R rows, T queries a row, H heads, K KV heads, D head dim, N pages of a store, P positions a page.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from apr_kernels.kv_pages import KVPages, is_quantised
from jax.experimental.pallas import tpu as pltpu
from kernel_layout import page_table
from kernel_runs import CaseRun, as_us

GPU_SPLITS = (1, 16)  # of a row's context, over programs
TPU_BLOCK_PAGES = (8, 32)
SLACK = 4.0  # times our error bound that a baseline may have: some keep partial results in the queries' dtype


def absent(reason: str) -> dict[str, Any]:
    """A baseline that could not be measured, and why."""
    return {"us": None, "reason": reason}


def first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def jax_public(run: CaseRun, platform: str, expected, *, timed: bool = True) -> dict[str, Any]:
    """The fastest of JAX's public kernels that reads the case, over a few of their settings; `absent` where none does.

    Args:
      platform: "cuda" or "tpu"; anything else has none.
      expected: the reference's result.
      timed: False only checks, in interpret mode where the settings say so.
    """
    settings, case = run.settings, run.case
    if platform not in ("cuda", "tpu"):
        return absent(f"JAX has no public paged attention for {platform}")
    if is_quantised(settings.kv_dtype):
        return absent("its quantised pages have another layout")
    table = page_table(case, run.layout, settings.page_size)
    if table is None:
        return absent("it takes no partly filled page in mid-sequence")
    if case.num_queries > 1 and platform == "cuda":
        return absent("decode only")
    if run.stores[0].k.shape[-1] != settings.head_dim or run.stores[0].v is None:
        return absent("it reads pages whose minor dimension is head_dim")
    best, failures = None, []
    interpreted = platform == "tpu" and settings.interpret
    for name, tables, call, make_store in _candidates(run, platform, table):
        try:
            with pltpu.force_tpu_interpret_mode() if interpreted else contextlib.nullcontext():
                found = _measure(run, call, tables, make_store, expected, timed)
        except Exception as error:  # whatever a compiler says of a kernel that is not ours
            failures.append(f"{name}: {first_line(error)}")
            continue
        if best is None or (timed and found["us"] < best["us"]):
            best = {"name": name, **found}
    return best or absent("; ".join(failures))


def _measure(
    run: CaseRun, call: Callable, tables: np.ndarray, make_store: Callable | None, expected, timed: bool
) -> dict[str, Any]:
    stores = run.stores if make_store is None else [make_store(store) for store in run.stores]
    prepared = jnp.asarray(run.maps[:, tables])
    scaled = (run.q * run.settings.head_dim**-0.5).astype(run.q.dtype)  # these kernels do not scale
    error, correct = run.error_of(run.once(call, prepared, scaled, stores), expected, SLACK)
    found = {"us": None, "max_error": error if np.isfinite(error) else None, "correct": correct, "reason": None}
    return found | (as_us(run.time_calls(call, prepared, stores)) if timed else {})


def _candidates(
    run: CaseRun, platform: str, table: np.ndarray
) -> Iterator[tuple[str, np.ndarray, Callable, Callable | None]]:
    """Names, page tables of the widths they want, `call`s of `CaseRun.time_calls`, and what makes their stores."""
    if platform == "cuda":
        yield from _gpu_candidates(run, table)
        return
    if run.case.num_queries == 1:
        yield from _tpu_candidates(run, table)
    yield from _ragged_candidates(run, table)


def _gpu_candidates(run: CaseRun, table: np.ndarray):
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    lengths = _lengths(run)
    block = max(1, min(8, 128 // run.settings.page_size))  # pages a step takes
    for splits in GPU_SPLITS:
        if splits > 1 and splits * block > 2 * table.shape[1]:
            continue  # most programs would read nothing

        def call(q, store, table, splits=splits):
            options = {"k_splits": splits, "pages_per_compute_block": block, "interpret": run.settings.interpret}
            return paged_attention(q[:, 0], store.k, store.v, table, lengths, **options)[:, None]

        yield f"pallas.ops.gpu.paged_attention, k_splits={splits}", _padded(table, splits * block), call, None


def _tpu_candidates(run: CaseRun, table: np.ndarray):
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    lengths = _lengths(run)
    for block in TPU_BLOCK_PAGES:

        def call(q, store, table, block=block):
            return paged_attention(q[:, 0], store.k, store.v, lengths, table, pages_per_compute_block=block)[:, None]

        yield f"pallas.ops.tpu.paged_attention, pages_per_compute_block={block}", _padded(table, block), call, None


def _ragged_candidates(run: CaseRun, table: np.ndarray):
    """With the block sizes that it was tuned to; the interpreter does not run it."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    lengths, case = _lengths(run), run.case
    starts = jnp.arange(case.num_rows + 1, dtype=jnp.int32) * case.num_queries
    num_rows = jnp.full(1, case.num_rows, jnp.int32)

    def call(q, store, table):
        o = ragged_paged_attention(q.reshape(-1, *q.shape[2:]), store, lengths, table, starts, num_rows)
        return o.reshape(q.shape)

    yield "pallas.ops.tpu.ragged_paged_attention", table, call, _interleaved


def _interleaved(store: KVPages) -> jax.Array:
    """[N, P, 2K, D]: each head's keys and then its values. A copy: all stores' take as much memory as they do."""
    k, v = (x.transpose(1, 2, 0, 3) for x in (store.k, store.v))
    return jnp.stack([k, v], 3).reshape(*k.shape[:2], -1, k.shape[-1])


def _lengths(run: CaseRun):
    sealed = np.zeros(run.case.num_rows, np.int32)
    for level in run.case.levels:
        for group in level:
            sealed[group.lo : group.hi] += sum(group.segments)
    return jnp.asarray(sealed + run.case.tail_len)


def _padded(table: np.ndarray, multiple: int) -> np.ndarray:
    """The table with the null page up to a multiple of pages."""
    return np.pad(table, ((0, 0), (0, -table.shape[1] % multiple)))
