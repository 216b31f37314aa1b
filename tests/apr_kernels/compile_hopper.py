"""Compiles the Hopper kernels for an H200 that is not there, and prints what the compiler says, one JSON line a case.

Run by `test_gpu_aot.py`, in a process of its own: the CUDA plugin must not meet a JAX that has chosen its platform.
"""

import functools
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).parents[2] / "apr_jax/aot/targets/h200.textproto"


def set_up() -> Path:
    """Readies the process, before JAX is imported. Returns the folder that the compiler's texts go to."""
    dump = Path(tempfile.mkdtemp())
    cuda = os.environ.get("CUDA_HOME") or Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve().parents[1]
    if not (Path(cuda) / "nvvm/libdevice").exists():
        cuda = "/usr/local/cuda"
    os.environ.update(
        JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", CUDA_HOME=str(cuda),
        XLA_FLAGS=f"--xla_gpu_cuda_data_dir={cuda}", TF_CPP_MIN_LOG_LEVEL="3",
        MOSAIC_GPU_DUMP_TO=str(dump), MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_PTXAS="1",
    )  # fmt: skip
    return dump


def shapes(case: dict, device):
    """Abstract pages, plan, queries, lengths of a call."""
    import jax
    import jax.numpy as jnp
    from apr_kernels.kv_pages import KVPages
    from apr_kernels.plan import Plan

    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    head_dim, page_size, rows, tokens = (case[name] for name in ("head_dim", "page_size", "rows", "tokens"))
    heads, kv_heads, dtype = case.get("heads", 32), case.get("kv_heads", 8), case.get("dtype", "bfloat16")
    pages, items, item_pages, partials = 16384 // page_size * 16, 256, 16, 8
    plan = Plan(
        pages=array(items, item_pages), fills=array(items, item_pages), rows=array(items, 2), tail_slot=array(items),
        tail_offset=array(items), row_slot=array(rows), tail_pages=array(rows, 256), partial_start=array(items),
        partials=array(rows, partials), num_shared=items // 2,
    )  # fmt: skip
    store = array(kv_heads, pages, page_size, head_dim, dtype=dtype)
    scale = array(kv_heads, pages, page_size, dtype="float32") if store.dtype.itemsize == 1 else None
    kv_pages = KVPages(store, store, scale, scale, page_size, kv_heads, head_dim)
    q = array(rows, tokens, heads, head_dim, dtype="bfloat16")
    new = array(rows, tokens, kv_heads, head_dim, dtype="bfloat16")
    return kv_pages, q, new, new, plan, array(rows), array(rows)


def step(kv_pages, q, k, v, plan, tail_len, num_queries, *, attends: bool):
    from apr_kernels.backends import GPU_HOPPER
    from apr_kernels.kv_update import kv_update
    from apr_kernels.paged_attention import paged_attention

    kv_pages = kv_update(kv_pages, k, v, plan, tail_len, num_queries, backend=GPU_HOPPER)
    if not attends:
        return kv_pages
    return kv_pages, *paged_attention(q, kv_pages, plan, tail_len, num_queries, backend=GPU_HOPPER)


def compile_case(case: dict, device, dump: Path) -> dict:
    import jax

    for path in dump.iterdir():
        path.unlink()
    arguments = shapes(case, device)
    function = functools.partial(step, attends=case.get("attends", True))
    lowered = jax.jit(function, donate_argnums=0).trace(*arguments).lower(lowering_platforms=("cuda",))
    memory = lowered.compile().memory_analysis()
    ptx = "".join(path.read_text() for path in dump.glob("*.ptx"))
    ptxas = "".join(path.read_text() for path in dump.glob("*.ptxas"))
    return {
        "case": case,
        "store_bytes": arguments[0].bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "kernels": len(re.findall(r"\.visible \.entry", ptx)),
        "registers": max((int(n) for n in re.findall(r"Used (\d+) registers", ptxas)), default=0),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", ptxas)),
        "serialised": "serialized" in ptxas,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        "bulk_stores": len(re.findall(r"cp\.async\.bulk\.global\.shared", ptx)),
    }


def main() -> None:
    dump = set_up()
    from jax.experimental import topologies

    device = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET.read_text()
    ).devices[0]
    for case in json.loads(sys.argv[1]):
        print(json.dumps(compile_case(case, device, dump)), flush=True)
    shutil.rmtree(dump)


if __name__ == "__main__":
    main()
