"""Dense, differentiable attention with an explicit mask: what training uses, and what tests compare with.

Letters: T tokens, V vocabulary, K KV heads, G query heads a KV head, Dh head_dim.
"""

import jax
import jax.numpy as jnp

from apr_jax.models.decoder import Attend, Decoder
from apr_jax.models.layers import accumulation_dtype, matmul_precision


def dense_attend(mask: jax.Array) -> Attend:
    """An `attend` over the tokens of one forward pass.

    Args:
      mask: bool[T, T]; token t attends to s where mask[t, s]. A token that may attend to nothing gets zeros.

    Returns:
      attend(q, k, v, cache) -> (o, cache); the cache is handed back untouched.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache):
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[1]
        wide, precision = accumulation_dtype(q.dtype), matmul_precision(q.dtype)
        grouped = q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = jnp.einsum("tkgd,skd->kgts", grouped, k, preferred_element_type=wide, precision=precision)
        scores = jnp.where(mask, scores * jnp.asarray(head_dim**-0.5, wide), jnp.finfo(wide).min)
        highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = jnp.where(mask, jnp.exp(scores - highest), 0)
        total = weights.sum(axis=-1, keepdims=True)
        weights = (weights / jnp.where(total == 0, 1, total)).astype(v.dtype)
        o = jnp.einsum("kgts,skd->tkgd", weights, v, precision=precision)
        return o.reshape(num_tokens, num_heads, head_dim), cache

    return attend


def dense_logits(decoder: Decoder, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits [T, V] of a plain forward pass over tokens: i32[T], positions: i32[T], mask: bool[T, T]."""
    hidden, _ = decoder(tokens, positions, [None] * decoder.config.num_layers, dense_attend(mask))
    return decoder.logits(hidden)
