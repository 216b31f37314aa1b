"""compile_aot.py as a person runs it; real compiles where a compiler is installed.

A CUDA compiler in an environment of its own is found through APR_AOT_CUDA_PYTHON, a TPU compiler through
APR_AOT_TPU_PYTHON: the path of that environment's python, which must have this project's dependencies too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--model=qwen3_0_6b", "--layers=2", "--threads=8", "--context=512")
# Two layers' cache over eight devices is small beside what sampling from the vocabulary needs, which is not split.
PAGES = {"v5e:2x4": ("--num_pages=120000",)}
_MODULES = {"TPU": "libtpu", "CUDA": "jax_cuda13_plugin"}


def python_for(compiler: str) -> str:
    """An interpreter that has the compiler; skips the test where there is none."""
    python = os.environ.get(f"APR_AOT_{compiler}_PYTHON", sys.executable)
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({_MODULES[compiler]!r}) is None)"
    if subprocess.run([python, "-c", probe], check=False).returncode:
        pytest.skip(f"no {compiler} compiler: {python} has no {_MODULES[compiler]}, and APR_AOT_{compiler}_PYTHON "
                    "names no other")  # fmt: skip
    return python


def run(*args: str, python: str = sys.executable) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [python, str(ROOT / "scripts" / "compile_aot.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "flag --target=None: Flag --target must have a value"),
        (("--target=v100",), "--target=v100: NVIDIA V100 has compute capability 7.0, the GPU kernels need 8.0"),
        (("--target=h200", "--model=gpt2"), "flag --model=gpt2: value should be one of"),
        (("--target=h200", "--layers=37"), "--layers=37, must be in [1, 36]"),
        (("--target=h200", "--context=100", "--own=101"), "own is 101, must be in [0, context = 100]"),
        (("--target=h200", "--prefill_chunk=0"), "prefill_chunk is 0, must be >= 1"),
    ],
)
def test_bad_input_is_one_line(args, message):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(("target", "module"), [("v5e:2x4", "libtpu"), ("h200", "jax_cuda13_plugin")])
def test_a_missing_compiler_is_named_with_its_installation(target, module):
    probe = f"import sys; sys.modules[{module!r}] = None; sys.argv = ['x', '--target={target}']; "
    probe += f"import runpy; sys.path.insert(0, {str(ROOT / 'scripts')!r}); "
    probe += f"runpy.run_path({str(ROOT / 'scripts' / 'compile_aot.py')!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert "compiler is not installed: pip install" in done.stderr and done.stderr.count("\n") == 1


def test_a_topology_that_is_too_small():
    code, out, err = run("--target=v6e:2x2", "--tensor=8", python=python_for("TPU"))
    assert (code, out) == (2, "")
    assert "--tensor=8: v6e:2x2 has 4 devices, name a larger topology" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "compiler", "tensor"),
    [
        ("v5e:2x4", "TPU", 8),
        ("v6e:2x2", "TPU", 1),
        ("h200", "CUDA", 1),
        pytest.param("tpu7x:2x2x1", "TPU", 1, marks=pytest.mark.exhaustive),
        pytest.param("a100", "CUDA", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_steps_compile_in_place(target, compiler, tensor):
    args = (f"--target={target}", f"--tensor={tensor}", *SMALL, *PAGES.get(target, ()))
    code, out, err = run(*args, python=python_for(compiler))
    assert code == 0, out[-3000:] + err[-3000:]
    result = json.loads(out.splitlines()[-1])
    assert result["compiles"] and result["fits"]
    assert result["attention"] != "reference"
    assert result["aliased_bytes"] >= result["cache_bytes"]
    assert result["temp_bytes"] < result["cache_bytes"] / 10
    for step in result["steps"].values():
        assert not step["cache_copied"], step["page_copies"]
        assert not step["weights_copied"], step["weight_copies"]
    if compiler == "CUDA":
        assert result["spills"] == 0
    if tensor > 1:
        assert result["steps"]["decode"]["collectives"]["all-reduce"] >= 4  # two a layer
