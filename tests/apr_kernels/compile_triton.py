"""Compiles the Triton kernels for a card that is not there, and prints what ptxas says, one JSON line a kernel.

Run by `test_gpu_triton_aot.py`, in a process of its own: the CUDA plugin must not meet a JAX that has chosen its
platform.
"""

import contextlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.apr_kernels.compile_hopper import set_up, shapes

TARGETS = Path(__file__).parents[2] / "apr_jax/aot/targets"
KERNELS = r"\w*(?:paged_attention|merge_partials)\w*"
INSTRUCTIONS = {
    "matrix": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b",
    "async_copies": r"\bcp\.async\.c[ag]\b",
    "float32": r"\bfma\.rn\.f32\b",
}


def step(kv_pages, q, k, v, plan, tail_len, num_queries):
    from apr_kernels.backends import GPU_TRITON
    from apr_kernels.kv_update import kv_update
    from apr_kernels.paged_attention import paged_attention

    kv_pages = kv_update(kv_pages, k, v, plan, tail_len, num_queries, backend=GPU_TRITON)
    return kv_pages, *paged_attention(q, kv_pages, plan, tail_len, num_queries, backend=GPU_TRITON)


def as_if_on(config: str) -> contextlib.AbstractContextManager:
    """From JAX 0.11 on, Pallas-Triton asks the mesh for the card's kind where there is no device to ask."""
    import jax

    if "platform" not in inspect.signature(jax.sharding.AbstractDevice).parameters:
        return contextlib.nullcontext()
    kind = re.search(r'^device_description_str: "(.*)"', config, re.MULTILINE)
    cores = re.search(r"^ *core_count: (\d+)", config, re.MULTILINE)
    assert kind and cores
    known = kind[1].replace("L40S", "L40")  # the same chip; Pallas does not know the L40S
    fields = {"device_kind": known, "platform": "gpu", "num_cores": int(cores[1])}
    device = jax.sharding.AbstractDevice(**fields)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def compile_case(case: dict, device, dump: Path) -> list[dict]:
    import jax

    for path in dump.iterdir():
        path.unlink()
    arguments = shapes(case, device)
    function = jax.jit(step, donate_argnums=0)
    memory = function.trace(*arguments).lower(lowering_platforms=("cuda",)).compile().memory_analysis()
    assert memory is not None
    totals = {
        "case": case,
        "store_bytes": arguments[0].bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }
    return [{**totals, **assemble(path)} for path in dump.glob("*.ptx") if entry(path)]


def entry(path: Path) -> str | None:
    """The kernel in a PTX file, if it is one of ours."""
    found = re.search(rf"\.entry\s+({KERNELS})", path.read_text())
    return found and found[1]


def assemble(path: Path) -> dict:
    text = path.read_text()
    target = re.search(r"^\.target\s+(\w+)", text, re.MULTILINE)
    assert target is not None
    command = [os.environ["CUDA_HOME"] + "/bin/ptxas", "-v", f"-arch={target[1]}", str(path), "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": entry(path),
        "architecture": target[1],
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", report)),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", report)),
        **{name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()},
    }


def main() -> None:
    dump = set_up()
    os.environ["XLA_FLAGS"] += f" --xla_dump_to={dump}"
    if version("jaxlib") >= "0.11":  # its XLA dumps no PTX unasked; that of 0.10 does not know the option
        os.environ["XLA_FLAGS"] += " --xla_dump_emitter_re=ptx"
    from jax.experimental import topologies

    config = (TARGETS / f"{sys.argv[1]}.textproto").read_text()
    device = topologies.get_topology_desc(
        platform="cuda", topology_name=sys.argv[1], topology="1x1x1", target_config=config
    ).devices[0]
    for case in json.loads(sys.argv[2]):
        with as_if_on(config):
            for result in compile_case(case, device, dump):
                print(json.dumps(result), flush=True)
    shutil.rmtree(dump)


if __name__ == "__main__":
    main()
