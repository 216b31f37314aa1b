"""Compiles the TPU's kernels for a chip that is not there, and prints what the compiler says, one JSON line a case.

Run by `test_tpu_aot.py`, in a process of its own: `compile_tpu.py TOPOLOGY CASES`, CASES a JSON list. A case gives
rows, tokens, head_dim, page_size, and may give dtype, num_kv_heads, group, num_pages, items and item_pages. A case
that does not compile has an "error".
"""

import json
import os
import sys
import time

DEFAULTS = {"dtype": "bfloat16", "num_kv_heads": 8, "group": 4, "num_pages": 8192, "items": 1216, "item_pages": 16}


def step(kv_pages, q, k, v, plan, tail_len, num_queries):
    from apr_kernels.backends import TPU
    from apr_kernels.kv_update import kv_update
    from apr_kernels.paged_attention import paged_attention

    kv_pages = kv_update(kv_pages, k, v, plan, tail_len, num_queries, backend=TPU)
    return kv_pages, *paged_attention(q, kv_pages, plan, tail_len, num_queries, backend=TPU)


def shapes(case: dict, device) -> tuple:
    """The step's arguments, as shapes on a device."""
    import jax
    import jax.numpy as jnp
    from apr_kernels.backends import TPU, format_for
    from apr_kernels.kv_pages import is_quantised, make_kv_pages
    from apr_kernels.plan import Plan

    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows, tokens, items, item_pages = (case[name] for name in ("rows", "tokens", "items", "item_pages"))
    head_dim, page_size, heads, dtype = (case[name] for name in ("head_dim", "page_size", "num_kv_heads", "dtype"))
    pages = jax.eval_shape(
        lambda: make_kv_pages(case["num_pages"], page_size, heads, head_dim, dtype, format_for(TPU, head_dim))
    )
    pages = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), pages)
    plan = Plan(
        pages=array(items, item_pages), fills=array(items, item_pages), rows=array(items, 2),
        tail_slot=array(items), tail_offset=array(items), row_slot=array(rows),
        tail_pages=array(rows, 32 + 2 * tokens // page_size), partial_start=array(items), partials=array(rows, 8),
        num_shared=items // 2,
    )  # fmt: skip
    dtype = jnp.bfloat16 if is_quantised(dtype) else jnp.dtype(dtype)
    q = array(rows, tokens, heads * case["group"], head_dim, dtype=dtype)
    k = array(rows, tokens, heads, head_dim, dtype=dtype)
    return pages, q, k, k, plan, array(rows), array(rows)


def compile_case(case: dict, device) -> dict:
    import jax

    arguments = shapes({**DEFAULTS, **case}, device)
    store_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]))
    start = time.perf_counter()
    try:
        traced = jax.jit(step, donate_argnums=0).trace(*arguments)
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    except Exception as error:  # the compiler raises types of its own; the caller fails on the message
        return {"case": case, "error": str(error)[:2000]}
    return {
        "case": case,
        "seconds": round(time.perf_counter() - start, 1),
        "store_bytes": store_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def main(topology: str, cases: str) -> None:
    # Nothing here runs on a TPU: several processes may compile at once, and no metadata server is to be asked.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    for case in json.loads(cases):
        print(json.dumps(compile_case(case, device)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
