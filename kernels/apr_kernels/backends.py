"""Which implementation of the kernels runs where.

| backend      | runs on                                                                  |
|--------------|--------------------------------------------------------------------------|
| `reference`  | everything: plain jax.numpy                                              |
| `tpu`        | TPUs: Pallas, Mosaic TPU                                                 |
| `gpu_hopper` | NVIDIA GPUs of compute capability 9.0: Pallas, Mosaic GPU                |
| `gpu_triton` | other NVIDIA GPUs from 8.0, and what `gpu_hopper` lacks: Pallas, Triton  |
"""

import dataclasses
import importlib
from typing import Any

from apr_kernels.kv_pages import HEAD_MAJOR, LANE_PACKED, LANE_PADDED, LANES

REFERENCE, TPU, GPU_HOPPER, GPU_TRITON = "reference", "tpu", "gpu_hopper", "gpu_triton"
BACKENDS = (REFERENCE, TPU, GPU_HOPPER, GPU_TRITON)


@dataclasses.dataclass(frozen=True)
class Target:
    """What code is compiled for.

    Attributes:
      platform: "cpu", "tpu" or "cuda".
      kind: the device's name, for messages.
      compute_capability: of a CUDA device, such as (9, 0); else ().
    """

    platform: str
    kind: str
    compute_capability: tuple[int, ...] = ()

    @property
    def cores(self) -> int:
        """Cores of a TPU that share a kernel's grid: two on v4 and v5p."""
        return 2 if self.kind in ("TPU v4", "TPU v5", "TPU v5p") else 1


def target_of(device: Any) -> Target:
    """The target that a `jax.Device` is."""
    platform = "cuda" if device.platform == "gpu" else device.platform
    capability = str(getattr(device, "compute_capability", "")) if platform == "cuda" else ""
    return Target(platform, device.device_kind, tuple(int(part) for part in capability.split(".") if part))


def choose_backend(target: Target, kv_dtype, page_size: int, head_dim: int) -> str:
    """The backend whose Pallas kernels serve these pages on a target.

    Raises:
      ValueError: no Pallas kernel does; the message names the value and what is supported.
    """
    candidates = {"tpu": (TPU,), "cuda": _cuda_backends(target)}.get(target.platform, ())
    if not candidates:
        raise ValueError(f"no Pallas kernel runs on {target.kind} ({target.platform}): use the reference")
    reasons = []
    for backend in candidates:
        reason = unsupported(backend, target, kv_dtype, page_size, head_dim)
        if reason is None:
            return backend
        reasons.append(f"{backend}: {reason}")
    raise ValueError(f"no Pallas kernel on {target.kind} for these pages: {'; '.join(reasons)}")


def unsupported(backend: str, target: Target, kv_dtype, page_size: int, head_dim: int) -> str | None:
    """Why a backend cannot serve these pages, from the tuning tables of both kernels; None where it can."""
    for kernel in ("paged_attention", "kv_update"):
        tuning = importlib.import_module(f"apr_kernels.{kernel}.tuning")
        reason = tuning.unsupported(backend, target, kv_dtype, page_size, head_dim)
        if reason is not None:
            return reason
    return None


def unlisted(backend: str, kv_dtype, page_size: int, head_dim: int) -> str | None:
    """Why a backend cannot serve these pages on any target; None where it can."""
    return importlib.import_module("apr_kernels.paged_attention.tuning").unlisted(
        backend, kv_dtype, page_size, head_dim
    )


def format_for(backend: str, head_dim: int) -> str:
    """The page format that a backend reads and writes."""
    if backend != TPU:
        return HEAD_MAJOR
    return LANE_PACKED if head_dim < LANES and 2 * head_dim % LANES == 0 else LANE_PADDED


def implementation(kernel: str, backend: str) -> Any:
    """The module of a kernel's backend.

    Raises:
      ValueError: the name is not that of a backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(BACKENDS)}")
    return importlib.import_module(f"apr_kernels.{kernel}.{backend}")


def _cuda_backends(target: Target) -> tuple[str, ...]:
    capability = target.compute_capability
    if capability < (8, 0):
        return ()
    return (GPU_HOPPER, GPU_TRITON) if capability == (9, 0) else (GPU_TRITON,)
