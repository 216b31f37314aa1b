"""What can be compiled for without being there: TPU slices by topology, NVIDIA cards by name.

Memory and bandwidth are those of the makers' data sheets: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, and
NVIDIA's for A100 SXM 80 GB, L40S, H100 SXM, H200 SXM, HGX B200.
"""

import dataclasses
import re
from pathlib import Path

from apr_kernels.backends import Target

from apr_jax.config import check

_GIB = 2**30
_TARGETS_DIR = Path(__file__).parent / "targets"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotTarget:
    """A slice of TPUs or a node of NVIDIA cards.

    Attributes:
      name: as on the command line, such as "v5e:2x4" or "h200".
      kernels: what the kernels' tables know it as.
      device_memory: bytes a device may use.
      device_bandwidth: bytes a second a device reads from its memory, by the data sheet.
      topology: keyword arguments of `get_topology_desc`, beside the platform.
      num_cores: multiprocessors of an NVIDIA card.
      max_devices: None: as many as the topology has; else up to so many cards of a node.
    """

    name: str
    kernels: Target
    device_memory: int
    device_bandwidth: float
    topology: dict[str, str]
    num_cores: int | None = None
    max_devices: int | None = None

    @property
    def platform(self) -> str:
        """ "tpu" or "cuda"."""
        return self.kernels.platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tpu:
    """A generation of TPU. JAX sees the two TensorCores of a v4 or v5p chip as one device, those of a tpu7x as two."""

    kind: str
    chip_memory: int
    chip_bandwidth: float
    example: str
    devices_per_chip: int = 1
    chip_config: str | None = None


_TPUS = {
    "v4": _Tpu(kind="TPU v4", chip_memory=32 * _GIB, chip_bandwidth=1.2e12, example="v4:2x2x1", chip_config="megacore"),
    "v5e": _Tpu(kind="TPU v5 lite", chip_memory=16 * _GIB, chip_bandwidth=0.819e12, example="v5e:2x4"),
    "v5p": _Tpu(kind="TPU v5", chip_memory=95 * _GIB, chip_bandwidth=2.765e12, example="v5p:2x2x1"),
    "v6e": _Tpu(kind="TPU v6 lite", chip_memory=32 * _GIB, chip_bandwidth=1.6e12, example="v6e:2x4"),
    "tpu7x": _Tpu(
        kind="TPU7x", chip_memory=192 * _GIB, chip_bandwidth=7.38e12, example="tpu7x:2x2x1", devices_per_chip=2
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Gpu:
    kind: str
    compute_capability: tuple[int, int]
    memory: int = 0
    bandwidth: float = 0.0


_GPUS = {
    "a100": _Gpu(kind="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0), memory=80 * 10**9, bandwidth=2.039e12),
    "l40s": _Gpu(kind="NVIDIA L40S", compute_capability=(8, 9), memory=48 * 10**9, bandwidth=0.864e12),
    "h100": _Gpu(kind="NVIDIA H100 SXM", compute_capability=(9, 0), memory=80 * 10**9, bandwidth=3.35e12),
    "h200": _Gpu(kind="NVIDIA H200", compute_capability=(9, 0), memory=141 * 10**9, bandwidth=4.8e12),
    "b200": _Gpu(kind="NVIDIA B200", compute_capability=(10, 0), memory=180 * 10**9, bandwidth=8.0e12),
}
# Known, and known not to work: they lack the kernels' instructions.
_TOO_OLD = {
    "p100": _Gpu(kind="NVIDIA P100", compute_capability=(6, 0)),
    "v100": _Gpu(kind="NVIDIA V100", compute_capability=(7, 0)),
    "t4": _Gpu(kind="NVIDIA T4", compute_capability=(7, 5)),
    "rtx2080ti": _Gpu(kind="NVIDIA RTX 2080 Ti", compute_capability=(7, 5)),
}
TARGET_NAMES = (*(tpu.example for tpu in _TPUS.values()), *_GPUS)
_GPUS_PER_NODE = 8


def find_target(name: str) -> AotTarget:
    """The target of a name such as "v5e:2x4" or "h200".

    Raises:
      ValueError: it is not known, or no kernel runs there; the message says why.
    """
    if name in _TOO_OLD:
        gpu = _TOO_OLD[name]
        capability = ".".join(map(str, gpu.compute_capability))
        raise ValueError(
            f"--target={name}: {gpu.kind} has compute capability {capability}, the GPU kernels need 8.0: they use "
            "bfloat16 matrix products and asynchronous copies that it lacks"
        )
    if name in _GPUS:
        return _gpu_target(name, _GPUS[name])
    generation, _, shape = name.partition(":")
    check(
        generation in _TPUS,
        f"--target={name} is not known: a TPU slice such as {', '.join(t.example for t in _TPUS.values())}, "
        f"or one of {', '.join(_GPUS)}",
    )
    tpu = _TPUS[generation]
    check(
        re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape) is not None,
        f"--target={name} names no topology: write it as {tpu.example}",
    )
    config = {} if tpu.chip_config is None else {"chip_config_name": tpu.chip_config}
    return AotTarget(
        name=name,
        kernels=Target("tpu", tpu.kind),
        device_memory=tpu.chip_memory // tpu.devices_per_chip,
        device_bandwidth=tpu.chip_bandwidth / tpu.devices_per_chip,
        topology={"topology_name": name, **config},
    )


def _gpu_target(name: str, gpu: _Gpu) -> AotTarget:
    text = (_TARGETS_DIR / f"{name}.textproto").read_text()
    cores = re.search(r"^ *core_count: (\d+)$", text, re.MULTILINE)
    assert cores is not None, name
    return AotTarget(
        name=name,
        kernels=Target("cuda", gpu.kind, gpu.compute_capability),
        device_memory=gpu.memory,
        device_bandwidth=gpu.bandwidth,
        topology={"topology_name": name, "target_config": text},
        num_cores=int(cores[1]),
        max_devices=_GPUS_PER_NODE,
    )
