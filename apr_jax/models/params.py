"""A decoder's parameters by name: `layers.0.attention.q.kernel`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from apr_jax.config import ModelConfig
from apr_jax.models.decoder import Decoder


def named_params(decoder: Decoder) -> dict[str, jax.Array]:
    """Every parameter by its dotted path; shapes instead of arrays if the decoder is abstract."""
    return {_name(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}


def check_finite(params: dict[str, jax.Array]) -> None:
    """Raises ValueError where a parameter has values that are not finite: what is written shall load and run."""
    for name, array in params.items():
        finite = jnp.isfinite(array)
        if finite.all():
            continue
        bad = array.size - int(finite.sum())
        raise ValueError(f"{bad:,} of {array.size:,} values of {name} are not finite")


def param_shapes(config: ModelConfig, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter of a decoder; allocates nothing."""
    _, flat = _abstract(config, dtype)
    return {_name(path): jax.ShapeDtypeStruct(variable.shape, variable.dtype) for path, variable in flat}


def build_decoder(config: ModelConfig, dtype, read: Callable[[str], jax.Array]) -> Decoder:
    """A decoder whose parameters are `read(name)`, one after another; none is initialized first.

    Args:
      config: the architecture.
      dtype: the decoder's.
      read: name -> array of the shape and dtype that `param_shapes` states.
    """
    graph, flat = _abstract(config, dtype)
    return nnx.merge(graph, nnx.from_flat_state([(path, var.replace(read(_name(path)))) for path, var in flat]))


def _abstract(config: ModelConfig, dtype):
    decoder = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(decoder)
    return graph, nnx.to_flat_state(state)


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
