"""FlashInfer's paged decode and cascade wrappers, on copies of the same stores, as a baseline on NVIDIA GPUs.

FlashInfer compiles its kernels with nvcc where it runs, at first use. `start_compiling` does so beside other work, in a
process of its own.

Letters: R rows, H heads, K KV heads, D head dim, N pages of a store, P positions a page, L stores, V variants.
"""

import dataclasses
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from apr_kernels.kv_pages import is_quantised
from kernel_baselines import SLACK, absent, first_line
from kernel_layout import page_table
from kernel_runs import CaseRun

WORKSPACE_BYTES = 256 << 20
DTYPES = ("bfloat16", "float16")
GRAPH_CALLS = 512  # that one CUDA graph holds, at most


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """What a wrapper's plan is told, and the scratch memory that all wrappers share: none runs beside another."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    workspace: Any


def why_absent(platform: str) -> str | None:
    """Why FlashInfer cannot run here; None where it can."""
    if platform != "cuda":
        return f"FlashInfer needs an NVIDIA GPU, this is {platform}"
    try:
        import flashinfer  # noqa: F401  # type: ignore[import-not-found]
        import torch
    except ImportError as error:
        return f"not installed: {error}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def start_compiling(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> subprocess.Popen | None:
    """Compiles the wrappers' kernels for these shapes in another process; None where there is no FlashInfer."""
    if why_absent("cuda") is not None:
        return None
    arguments = f"{num_heads}, {num_kv_heads}, {head_dim}, {dtype!r}"
    code = f"import kernel_flashinfer; kernel_flashinfer.compile_kernels({arguments})"
    folder = __file__.rpartition("/")[0] or "."
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.DEVNULL)


def compile_kernels(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> None:
    """Runs every wrapper once on a context of two pages."""
    import torch

    kind, page_size = getattr(torch, dtype), 16
    cache = tuple(torch.zeros(3, page_size, num_kv_heads, head_dim, dtype=kind, device="cuda") for _ in range(2))
    q = torch.zeros(1, num_heads, head_dim, dtype=kind, device="cuda")
    shapes = _Shapes(num_heads, num_kv_heads, head_dim, kind, _workspace())
    levels = [([0, 1], [[1]], [page_size]), ([0, 1], [[2]], [page_size])]
    for make in (_cascade, _decode_by_cuda_cores, _decode_by_tensor_cores):
        make(levels if make is _cascade else levels[:1], page_size, shapes)(q, cache)
    torch.cuda.synchronize()


def flashinfer(run: CaseRun, platform: str, expected) -> dict[str, Any]:
    """The fastest of FlashInfer's wrappers on a case; `absent` where none can."""
    reason = why_absent(platform)
    settings, case = run.settings, run.case
    if reason is None and case.num_queries > 1:
        reason = "its cascade is measured in decode only"
    if reason is None and (settings.dtype not in DTYPES or settings.kv_dtype != settings.dtype):
        reason = f"measured with pages and queries of {' or '.join(DTYPES)}"
    if reason is None and is_quantised(settings.kv_dtype):
        reason = "its quantised pages have one scale for all tokens"
    if reason is not None:
        return absent(reason)
    import torch

    stores = [tuple(_to_torch(pages) for pages in (store.k, store.v)) for store in run.stores]
    q = torch.from_dlpack(run.q[:, 0]).clone()
    shapes = _Shapes(settings.num_heads, settings.num_kv_heads, settings.head_dim, q.dtype, _workspace())
    best, failures = None, []
    for name, levels, page_size, make in _candidates(run):
        try:
            moved = [_mapped(levels, page_map, settings.page_size, page_size) for page_map in run.maps]
            calls = [make(each, page_size, shapes) for each in moved]
            caches = [tuple(_paged(pages, page_size) for pages in store) for store in stores]
            found = {"name": name, "reason": None, **_measure(run, calls, caches, q, expected)}
        except Exception as error:  # whatever FlashInfer or nvcc says
            failures.append(f"{name}: {first_line(error)}")
            continue
        if best is None or (found["correct"], -found["us"]) > (best["correct"], -best["us"]):
            best = found
    torch.cuda.empty_cache()
    return best or absent("; ".join(failures))


def _measure(run: CaseRun, calls: list[Callable], caches: list, q, expected) -> dict[str, Any]:
    import torch

    o = calls[0](q, caches[0])
    error, correct = run.error_of(jnp.from_dlpack(o.float().contiguous())[:, None], expected, SLACK)
    rotation = len(calls) * len(caches)
    num_calls = rotation * max(1, min(run.num_calls, GRAPH_CALLS) // rotation)

    def calls_in_turn():
        x = q
        for i, cache in itertools.islice(itertools.cycle(itertools.product(range(len(calls)), caches)), num_calls):
            x = calls[i](x, cache)

    try:
        graph = torch.cuda.CUDAGraph()
        calls_in_turn()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            calls_in_turn()
        launch, how = graph.replay, "CUDA graph"
    except RuntimeError as error:  # a wrapper that asks the host
        torch.cuda.synchronize()
        launch, how = calls_in_turn, f"launched one by one ({first_line(error)})"
    seconds = _seconds(launch, num_calls, run.settings.repeats, run.settings.min_s)
    return {
        "us": 1e6 * float(np.median(seconds)),
        "us_min": 1e6 * min(seconds),
        "us_max": 1e6 * max(seconds),
        "max_error": error if np.isfinite(error) else None,
        "correct": correct,
        "timed": how,
    }


def _seconds(launch: Callable[[], None], num_calls: int, repeats: int, min_s: float) -> list[float]:
    """Seconds of a call in each repeat, between events on the device."""
    import torch

    def once(passes: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(passes):
            launch()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3

    once(1)
    passes = max(1, round(min_s / max(once(1), 1e-6)))
    return [once(passes) / (passes * num_calls) for _ in range(repeats)]


# A level is (first query of each group and the last's end, page ids of each group, valid tokens of its last page).


def _candidates(run: CaseRun):
    """Names, levels, page sizes and makers. Partly filled pages in mid-sequence need pages of one token."""
    settings, case, layout = run.settings, run.case, run.layout
    table = page_table(case, layout, settings.page_size)
    page_size = settings.page_size if table is not None else 1
    levels, tails = _levels(run, page_size), _tail_level(run, page_size)
    suffix = "" if page_size > 1 else ", page size 1"
    shares = any(group.hi - group.lo > 1 for level in case.levels for group in level)
    if shares:
        yield f"MultiLevelCascadeAttentionWrapper{suffix}", [*levels, tails], page_size, _cascade
    rows = _by_row(run, page_size)
    for make, how in ((_decode_by_tensor_cores, "tensor cores"), (_decode_by_cuda_cores, "CUDA cores")):
        yield f"BatchDecodeWithPagedKVCacheWrapper, {how}{suffix}", [rows], page_size, make


def _levels(run: CaseRun, page_size: int) -> list[tuple]:
    levels = []
    for level in run.layout.groups:
        bounds = [group.lo for group, _, _ in level] + [level[-1][0].hi]
        found = [_ids(pages, fills, run.settings.page_size, page_size) for _, pages, fills in level]
        levels.append((bounds, [ids for ids, _ in found], [last for _, last in found]))
    return levels


def _tail_level(run: CaseRun, page_size: int) -> tuple:
    fills = _fills(run.case.tail_len, run.settings.page_size)
    found = [_ids(pages, fills, run.settings.page_size, page_size) for pages in run.layout.tails]
    return list(range(run.case.num_rows + 1)), [ids for ids, _ in found], [last for _, last in found]


def _by_row(run: CaseRun, page_size: int) -> tuple:
    """All that each row reads, as one sequence."""
    rows: list[list[int]] = [[] for _ in range(run.case.num_rows)]
    for (bounds, ids, _), level in zip(_levels(run, page_size), run.case.levels):
        for lo, hi, each in zip([group.lo for group in level], bounds[1:], ids):
            for row in range(lo, hi):
                rows[row] += each
    bounds, tails, last = _tail_level(run, page_size)
    return bounds, [row + tail for row, tail in zip(rows, tails)], last


def _fills(tokens: int, page_size: int) -> list[int]:
    return [page_size] * (tokens // page_size) + [tokens % page_size] * (tokens % page_size > 0)


def _ids(pages: list[int], fills: list[int], stored: int, page_size: int) -> tuple[list[int], int]:
    """Page ids and the last one's valid tokens; ids of single tokens where page_size is 1 and the store's is not."""
    if page_size == stored:
        return pages, fills[-1]
    return [page * stored + slot for page, fill in zip(pages, fills) for slot in range(fill)], 1


def _mapped(levels: list[tuple], page_map: np.ndarray, stored: int, page_size: int) -> list[tuple]:
    """The levels on a variant's pages."""
    scale = stored // page_size

    def move(ids):
        ids = np.asarray(ids)
        return page_map[ids // scale] * scale + ids % scale

    return [(bounds, [move(each) for each in ids], last) for bounds, ids, last in levels]


def _cascade(levels: list[tuple], page_size: int, shapes: _Shapes) -> Callable:
    import flashinfer  # type: ignore[import-not-found]

    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(levels), shapes.workspace, "NHD")
    indptrs, indices, last = (list(each) for each in zip(*(_indices(ids, last) for _, ids, last in levels)))
    queries = [_ints(bounds) for bounds, _, _ in levels]
    sizes = (shapes.num_heads, shapes.num_kv_heads, shapes.head_dim, page_size)
    wrapper.plan(queries, indptrs, indices, last, *sizes, q_data_type=shapes.dtype)
    return wrapper.run


def _decode(levels: list[tuple], page_size: int, shapes: _Shapes, *, use_tensor_cores: bool) -> Callable:
    import flashinfer  # type: ignore[import-not-found]

    ((_, ids, last),) = levels
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(shapes.workspace, "NHD", use_tensor_cores=use_tensor_cores)
    sizes = (shapes.num_heads, shapes.num_kv_heads, shapes.head_dim, page_size)
    wrapper.plan(*_indices(ids, last), *sizes, q_data_type=shapes.dtype, kv_data_type=shapes.dtype)
    return wrapper.run


_decode_by_tensor_cores = functools.partial(_decode, use_tensor_cores=True)
_decode_by_cuda_cores = functools.partial(_decode, use_tensor_cores=False)


def _workspace():
    import torch

    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def _indices(ids: list, last: list[int]) -> tuple:
    indptr = np.concatenate([[0], np.cumsum([len(each) for each in ids])])
    return _ints(indptr), _ints(np.concatenate(ids)), _ints(last)


def _ints(values):
    import torch

    return torch.as_tensor(np.asarray(values, np.int32), device="cuda")


def _to_torch(pages: jax.Array):
    """[K, N, P, D] as FlashInfer's NHD [N, P, K, D], a copy."""
    import torch

    return torch.from_dlpack(pages).permute(1, 2, 0, 3).contiguous()


def _paged(pages, page_size: int):
    """[N, P, K, D] as pages of another size."""
    return pages.reshape(-1, page_size, *pages.shape[2:])
