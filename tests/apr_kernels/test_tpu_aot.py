"""The TPU's kernels compiled for chips that are not there: they are accepted, and nothing copies the store.

Needs a Python with libtpu: this one, or the one that APR_AOT_TPU_PYTHON names.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = os.environ.get("APR_AOT_TPU_PYTHON", sys.executable)
ROOT = Path(__file__).parents[2]
DECODE, PREFILL = {"rows": 64, "tokens": 1}, {"rows": 4, "tokens": 256}
QWEN3_8B = {"head_dim": 128, "num_kv_heads": 8, "group": 4}


def run(topology: str, cases: list[dict]) -> list[dict]:
    command = [PYTHON, str(Path(__file__).parent / "compile_tpu.py"), topology, json.dumps(cases)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def has_libtpu() -> bool:
    command = "import importlib.util as u, sys; sys.exit(u.find_spec('libtpu') is None)"
    return subprocess.run([PYTHON, "-c", command], check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_libtpu(), reason=f"{PYTHON} has no libtpu (see APR_AOT_TPU_PYTHON)"),
]


def check(topology: str, cases: list[dict]):
    """A refusal, a temporary of a tenth of the store or a missing alias fails."""
    results = run(topology, cases)
    assert len(results) == len(cases)
    for result in results:
        assert "error" not in result, result
        assert result["aliased_bytes"] == result["store_bytes"], result
        assert result["temp_bytes"] < result["store_bytes"] / 10, result


# A minute a case: the other card only where all is asked for, as its kernels and page formats are the same.
@pytest.mark.parametrize("topology", ["v5e:2x4", pytest.param("v6e:2x2", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_sizes_and_dtypes(topology, shape):
    sizes = [(64, 8), (80, 16), (96, 32), (128, 16), (128, 128), (256, 64)]
    cases = [{**shape, "head_dim": head_dim, "page_size": page_size} for head_dim, page_size in sizes]
    for dtype in ("float32", "int8", "float8_e4m3fn"):
        cases += [{**shape, "head_dim": d, "page_size": p, "dtype": dtype} for d, p in ((64, 8), (128, 16), (256, 32))]
    check(topology, cases)


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x2"])
def test_shapes_of_an_8b_model(topology):
    """64 threads in decode, chunks of 2,048 tokens in prefill, a batch of 256 with one KV head a device, long plans."""
    check(
        topology,
        [
            *({**QWEN3_8B, **DECODE, "page_size": page_size} for page_size in (16, 64)),
            {**QWEN3_8B, "rows": 4, "tokens": 2048, "page_size": 64, "items": 2400},
            {**QWEN3_8B, "rows": 256, "tokens": 1, "page_size": 16, "num_kv_heads": 1},
            {**QWEN3_8B, **DECODE, "page_size": 16, "num_pages": 140_000, "items": 18_000},
        ],
    )
