"""The Hopper kernels compiled for an H200, without one: nothing spills, and the update is in place.

Needs a Python with the CUDA plugin, which is not this one (JAX would try to use it): APR_AOT_CUDA_PYTHON names it. To
make one: `python -m venv DIR; DIR/bin/pip install jax==V; DIR/bin/pip install --no-deps jax-cuda13-plugin==V
jax-cuda13-pjrt==V`, V being the JAX version; nvcc on the path, or CUDA_HOME, names the CUDA toolkit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = os.environ.get("APR_AOT_CUDA_PYTHON", sys.executable)
ROOT = Path(__file__).parents[2]
DECODE, PREFILL = {"rows": 64, "tokens": 1}, {"rows": 4, "tokens": 512}


def run(cases: list[dict]) -> list[dict]:
    command = [PYTHON, str(Path(__file__).parent / "compile_hopper.py"), json.dumps(cases)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def has_cuda_plugin() -> bool:
    command = "import importlib.util as u, sys; sys.exit(u.find_spec('jax_cuda13_plugin') is None)"
    return subprocess.run([PYTHON, "-c", command], check=False).returncode == 0


pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not has_cuda_plugin(), reason=f"{PYTHON} has no jax_cuda13_plugin (see APR_AOT_CUDA_PYTHON)"),
]


def check(result: dict, temp_share: float):
    """A temporary as large as the cache, a missing alias or a spill fails."""
    assert result["aliased_bytes"] == result["store_bytes"], result
    assert result["temp_bytes"] < temp_share * result["store_bytes"], result
    assert result["spills"] == 0, result


@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_attention_compiles_without_spills(shape):
    sizes = [(64, 16), (80, 16), (96, 32), (128, 8), (128, 16), (128, 128), (256, 64)]
    results = run([{**shape, "head_dim": head_dim, "page_size": page_size} for head_dim, page_size in sizes])
    assert len(results) == len(sizes)
    for result in results:
        check(result, 0.3)  # partials of 8 times 2048 queries, in prefill
        assert result["wgmma"] > 0 and result["tma_loads"] > 0 and result["bulk_stores"] == 2, result
        assert result["registers"] <= 232 and not result["serialised"], result


def test_groups_of_queries():
    groups = [(8, 8, 128), (8, 8, 80), (56, 8, 128), (64, 8, 128)]
    cases = [{**DECODE, "heads": heads, "kv_heads": kv, "head_dim": dim, "page_size": 16} for heads, kv, dim in groups]
    for result in run(cases):
        check(result, 0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_update_is_in_place(dtype):
    shapes = [DECODE, {"rows": 4, "tokens": 2048}]
    cases = [{**shape, "head_dim": 128, "page_size": 16, "dtype": dtype, "attends": False} for shape in shapes]
    for result in run(cases):
        check(result, 0.001)
