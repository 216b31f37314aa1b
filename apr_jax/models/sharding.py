"""Tensor parallelism: how a decoder's parameters lie on a mesh with one axis, "tensor".

Heads and the MLP's hidden units are split, as in Megatron-LM (arXiv 1909.08053): the products before them by
columns, those after them by rows, so that a layer needs two all-reduces. The vocabulary is split too where it divides.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.config import ModelConfig, check

TENSOR = "tensor"

_COLUMNS = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
_ROWS = ("attention.o", "mlp.down")


def make_mesh(tensor: int, devices=None) -> Mesh | None:
    """A mesh of `tensor` devices; None for one.

    Raises:
      ValueError: there are fewer devices.
    """
    if tensor == 1:
        return None
    devices = jax.devices() if devices is None else devices
    check(len(devices) >= tensor, f"tensor is {tensor}, there are {len(devices)} devices ({devices[0].platform})")
    return Mesh(np.array(devices[:tensor]), (TENSOR,))


def check_divisible(config: ModelConfig, tensor: int) -> None:
    """Refuses what cannot be split. Raises ValueError naming the size."""
    for name in ("num_heads", "num_kv_heads", "d_ff"):
        size = getattr(config, name)
        check(size % tensor == 0, f"tensor is {tensor}, it must divide {name} = {size}")


def param_spec(name: str, shape: tuple[int, ...], tensor: int) -> PartitionSpec:
    """How a parameter is split.

    Args:
      name: as in `named_params`, such as "layers.0.attention.q.kernel".
      shape: of the whole parameter.
    """
    module, _, kind = name.rpartition(".")
    if module.endswith(_COLUMNS):
        return PartitionSpec(*[None] * (len(shape) - 1), TENSOR)
    if module.endswith(_ROWS) and kind == "kernel":
        return PartitionSpec(TENSOR, None)
    if name == "embedding" and shape[0] % tensor == 0:
        return PartitionSpec(TENSOR, None)
    if name.startswith("lm_head") and shape[-1] % tensor == 0:
        return PartitionSpec(*[None] * (len(shape) - 1), TENSOR)
    return PartitionSpec()


def param_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """`param_spec` on a mesh."""
    return NamedSharding(mesh, param_spec(name, shape, mesh.shape[TENSOR]))
