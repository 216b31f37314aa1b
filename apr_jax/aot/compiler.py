"""The compilers themselves: are they installed, how they are set up, and the devices they compile for."""

import functools
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from apr_jax.aot.target import AotTarget
from apr_jax.config import check

_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13")


def set_up(target: AotTarget, dump_dir: Path) -> None:
    """Readies this process for compiling; to be called once, before JAX has a backend.

    The compiler is told to leave its texts in dump_dir: optimised HLO and PTX. (A TPU program's HLO is not to be had
    from JAX where it holds asynchronous calls of several operands.)

    Raises:
      ValueError: the compiler is not installed; the message names the command that installs it.
    """
    version = jax.__version__
    flags = [f"--xla_dump_to={dump_dir}", "--xla_dump_hlo_as_text"]
    if target.platform == "tpu":
        check(
            importlib.util.find_spec("libtpu") is not None,
            f"--target={target.name}: the TPU compiler is not installed: pip install libtpu",
        )
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock is for chips, of which none is touched
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    else:
        check(
            all(_is_installed(module) for module in _CUDA_PLUGINS),
            f"--target={target.name}: the CUDA compiler is not installed: "
            f"pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}",
        )
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump_dir)
        os.environ.update({f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "HOST_LLVM")})
        flags.append(f"--xla_gpu_cuda_data_dir={cuda_dir()}")
        os.environ.setdefault("CUDA_HOME", str(cuda_dir()))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program from a cache leaves no dump


def devices_of(target: AotTarget, tensor: int) -> Sequence[Any]:
    """Compile-only devices, at least `tensor` of them.

    Raises:
      ValueError: the topology has fewer, or does not exist.
    """
    topology = dict(target.topology)
    if target.max_devices is not None:
        check(tensor <= target.max_devices, f"--tensor={tensor}: {target.name} is a node of {target.max_devices}")
        topology["topology"] = f"1x1x{tensor}"
    name = topology.pop("topology_name")
    try:
        devices = topologies.get_topology_desc(platform=target.platform, topology_name=name, **topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--target={target.name}: {str(error).splitlines()[0]}") from error
    check(
        tensor <= len(devices),
        f"--tensor={tensor}: {target.name} has {len(devices)} devices, name a larger topology",
    )
    return devices


@functools.cache
def cuda_dir() -> Path:
    """The CUDA toolkit: the folder with `nvvm/libdevice` and `bin/ptxas`.

    Raises:
      ValueError: there is none.
    """
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    roots += [Path(nvcc).resolve().parents[1]] if nvcc else []
    roots.append(Path("/usr/local/cuda"))
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations or () if wheels else ():
        roots += [Path(folder) / "cu13", Path(folder) / "cuda_nvcc"]
    for root in roots:
        if (root / "nvvm/libdevice/libdevice.10.bc").exists() and (root / "bin/ptxas").exists():
            return root
    raise ValueError(
        "the CUDA toolkit's ptxas and libdevice are not found (CUDA_HOME, nvcc, /usr/local/cuda): "
        'pip install "nvidia-cuda-nvcc>=13,<14" "nvidia-nvvm>=13,<14"'
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
