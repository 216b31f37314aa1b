"""The Triton kernels compiled for cards that are not there: no spill, no copy of the store, matrix units in use.

Needs a Python with the CUDA plugin, as `test_gpu_aot.py` does: APR_AOT_CUDA_PYTHON names it.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.apr_kernels.test_gpu_aot import PYTHON, has_cuda_plugin

ROOT = Path(__file__).parents[2]
DECODE, PREFILL = {"rows": 64, "tokens": 1}, {"rows": 4, "tokens": 512}
CARDS = ("a100", "l40s", "h200", "b200")

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not has_cuda_plugin(), reason=f"{PYTHON} has no jax_cuda13_plugin (see APR_AOT_CUDA_PYTHON)"),
]


def run(card: str, cases: list[dict]) -> list[dict]:
    """What ptxas says of each kernel of each case."""
    command = [PYTHON, str(Path(__file__).parent / "compile_triton.py"), card, json.dumps(cases)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(results: list[dict], num_cases: int, num_kernels: int, temp_share: float):
    """A temporary as large as the store, a missing alias, a spill or a product without matrix units fails."""
    assert len(results) == num_cases * num_kernels
    for result in results:
        assert result["aliased_bytes"] == result["store_bytes"], result
        assert result["temp_bytes"] < temp_share * result["store_bytes"], result
        assert result["spills"] == 0, result
        if result["kernel"].startswith("paged_attention"):
            assert result["async_copies"] > 0, result
            # On Hopper and Blackwell too, narrow windows use mma.sync; float32 at full precision has no matrix units.
            assert result["matrix" if result["case"].get("dtype") != "float32" else "float32"] > 0, result


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("shape", "num_kernels"), [(DECODE, 3), (PREFILL, 2)], ids=["decode", "prefill"])
def test_head_dims_and_page_sizes(shape, num_kernels, card):
    sizes = [(64, 8), (80, 16), (96, 32), (128, 16), (256, 128)]
    cases = [{**shape, "head_dim": head_dim, "page_size": page_size} for head_dim, page_size in sizes]
    check(run(card, cases), len(cases), num_kernels, 0.3)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("shape", "num_kernels"), [(DECODE, 3), (PREFILL, 2)], ids=["decode", "prefill"])
def test_dtypes(shape, num_kernels, card):
    dtypes = ["float32", "int8", *(["float8_e4m3fn"] if card != "a100" else [])]
    cases = [
        {**shape, "head_dim": head_dim, "page_size": 16, "dtype": dtype}
        for head_dim in (80, 96, 128, 256)
        for dtype in dtypes
    ]
    check(run(card, cases), len(cases), num_kernels, 0.6)
