"""Dense attention for training: differentiable, causal by chunks, with products laid out for the CPU.

The heads of a group are folded into the rows of one batched product, key chunks that lie wholly after a
query chunk are skipped, and the backward pass is written by hand so that no large operand is transposed
(the derived one spends two thirds of a CPU step there).

Letters: T tokens, S keys, K KV heads, G query heads a KV head, Dh head_dim, N = chunk * G rows.
"""

from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 128


def masked_attend(mask: jax.Array):
    """A differentiable `attend` for the decoder with an explicit mask.

    Args:
      mask: bool[T, T], (query, key); no key later than its query, and every query sees at least one.
    """
    bias = jnp.where(mask, 0.0, -1e30)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any):
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[1]
        q = (q * head_dim**-0.5).reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
        o = _attention(q.transpose(1, 0, 2, 3), k.transpose(1, 0, 2), v.transpose(1, 0, 2), bias)
        return o.transpose(1, 0, 2, 3).reshape(num_tokens, num_heads, head_dim), cache

    return attend


def _chunks(num_tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHUNK, num_tokens)) for start in range(0, num_tokens, CHUNK)]


def _rows(x: jax.Array) -> jax.Array:
    """[K, T, G, Dh] to [K, T * G, Dh]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
    """q: [K, T, G, Dh] scaled, k and v: [K, T, Dh], bias: [T, T] -> o: [K, T, G, Dh], residuals."""
    num_kv_heads, num_tokens, group_size, _ = q.shape
    outputs, weights = [], []
    for start, stop in _chunks(num_tokens):
        scores = jnp.einsum("knd,ksd->kns", _rows(q[:, start:stop]), k[:, :stop])
        scores = scores.reshape(num_kv_heads, stop - start, group_size, stop) + bias[start:stop, None, :stop]
        scores = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        p = scores / scores.sum(axis=-1, keepdims=True)
        p = p.reshape(num_kv_heads, -1, stop)
        outputs.append(jnp.einsum("kns,ksd->knd", p, v[:, :stop]))
        weights.append(p)
    o = jnp.concatenate(outputs, axis=1).reshape(q.shape)
    return o, (q, k, v, o, weights)


def _backward(residuals, g):
    q, k, v, o, weights = residuals
    num_tokens = q.shape[1]
    dq, dk_t, dv_t = [], jnp.zeros_like(k).swapaxes(1, 2), jnp.zeros_like(v).swapaxes(1, 2)
    for (start, stop), p in zip(_chunks(num_tokens), weights, strict=True):
        g_rows, o_rows, q_rows = (_rows(x[:, start:stop]) for x in (g, o, q))
        dp = jnp.einsum("knd,ksd->kns", g_rows, v[:, :stop])
        ds = p * (dp - (g_rows * o_rows).sum(axis=-1, keepdims=True))
        dq.append(jnp.einsum("kns,ksd->knd", ds, k[:, :stop]))
        dk_t = dk_t.at[:, :, :stop].add(jnp.einsum("knd,kns->kds", q_rows, ds))
        dv_t = dv_t.at[:, :, :stop].add(jnp.einsum("knd,kns->kds", g_rows, p))
    dq = jnp.concatenate(dq, axis=1).reshape(q.shape)
    return dq, dk_t.swapaxes(1, 2), dv_t.swapaxes(1, 2), jnp.zeros((num_tokens, num_tokens), q.dtype)


_attention.defvjp(_forward, _backward)
