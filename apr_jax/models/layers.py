"""The decoder's building blocks. Letters: T tokens, D d_model, F d_ff, H heads, K KV heads, Dh head_dim.

Weights are laid out [in, out]. Sums are accumulated in at least float32; float64 stays float64 throughout.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from apr_jax.config import ModelConfig
from apr_jax.models.rope import rotate


def accumulation_dtype(dtype) -> jnp.dtype:
    """float64 for float64, float32 for everything narrower."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """float32 products are exact on every backend (no TF32), unless the caller set JAX's default."""
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 and chosen is None else None


class Linear(nnx.Module):
    """y = x @ kernel (+ bias), kernel: [in, out]. `residual_scale` multiplies the initial weights."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool, dtype, rngs: nnx.Rngs, residual_scale: float = 1.0):
        std = residual_scale * d_in**-0.5
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (d_in, d_out), dtype) * jnp.asarray(std, dtype))
        self.bias = nnx.Param(jnp.zeros(d_out, dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.matmul(x, self.kernel[...], precision=matmul_precision(x.dtype))
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """Root mean square norm over the last dimension, then a scale: [width]."""

    def __init__(self, width: int, eps: float, *, dtype):
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(accumulation_dtype(x.dtype))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...]


class Attention(nnx.Module):
    """Projections, query and key norms and rotation; the attention itself is the caller's `attend`."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(config.d_model, q_width, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.k = Linear(config.d_model, kv_width, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.v = Linear(config.d_model, kv_width, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.o = Linear(q_width, config.d_model, bias=config.out_bias, dtype=dtype, rngs=rngs,
                        residual_scale=(2 * config.num_layers) ** -0.5)  # fmt: skip
        self.q_norm = RMSNorm(config.head_dim, config.rms_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_eps, dtype=dtype) if config.qk_norm else None
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )

    def __call__(self, x: jax.Array, table, cache, attend):
        """Maps x: [T, D] to (y: [T, D], cache)."""
        num_tokens = x.shape[0]
        # Behind a barrier, or XLA's TPU compiler draws the split into heads into the products and copies their weights.
        q, k, v = jax.lax.optimization_barrier((self.q(x), self.k(x), self.v(x)))
        q = q.reshape(num_tokens, self.num_heads, self.head_dim)
        k = k.reshape(num_tokens, self.num_kv_heads, self.head_dim)
        v = v.reshape(num_tokens, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        o, cache = attend(rotate(q, table), rotate(k, table), v, cache)
        return self.o(o.astype(x.dtype).reshape(num_tokens, self.num_heads * self.head_dim)), cache


class GatedMlp(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        self.gate = Linear(config.d_model, config.d_ff, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.up = Linear(config.d_model, config.d_ff, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.down = Linear(config.d_ff, config.d_model, bias=config.mlp_bias, dtype=dtype, rngs=rngs,
                           residual_scale=(2 * config.num_layers) ** -0.5)  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind its norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.rms_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.rms_eps, dtype=dtype)
        self.mlp = GatedMlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, table, cache, attend):
        with jax.named_scope("attention"):
            y, cache = self.attention(self.attention_norm(x), table, cache, attend)
        x = x + y
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x)), cache
