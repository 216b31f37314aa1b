"""Initial weights that make a skill easy to find."""

import jax.numpy as jnp
import numpy as np

from apr_jax.models.decoder import Decoder


def tie_matching_heads(decoder: Decoder) -> None:
    """Starts the first query head of every group from its key head's weights; changes the decoder in place.

    Such a head attends to tokens like its own, so that "this value occurred before" is visible from the first step.
    From random weights a small model does not find it within two thousand steps. All of it is trained.
    """
    config = decoder.config
    for layer in decoder.layers:
        queries, keys = np.array(layer.attention.q.kernel[...]), np.array(layer.attention.k.kernel[...])
        heads = queries.reshape(config.d_model, config.num_kv_heads, config.group_size, config.head_dim)
        heads[:, :, 0] = keys.reshape(config.d_model, config.num_kv_heads, config.head_dim)
        layer.attention.q.kernel[...] = jnp.asarray(heads.reshape(queries.shape))
