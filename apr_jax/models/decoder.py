"""The decoder: maps the tokens of one thread; callers add the thread axis with `jax.vmap`.

Letters: T tokens, D d_model, V vocabulary, H heads, K KV heads, Dh head_dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from apr_jax.config import ModelConfig, check
from apr_jax.models.layers import DecoderLayer, RMSNorm, accumulation_dtype, matmul_precision
from apr_jax.models.rope import rope_table

# attend(q: [T, H, Dh], k: [T, K, Dh], v: [T, K, Dh], cache) -> (o: [T, H, Dh], cache). Queries come rotated
# but not scaled, keys rotated; attend scales by Dh ** -0.5.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Decoder(nnx.Module):
    """A Llama-like decoder. Layers are unrolled, each with arrays of its own: stacked, XLA would copy them.

    Args:
      config: the architecture.
      dtype: of parameters and activations: float32, bfloat16, float16 or float64 (needs JAX's x64 mode).
      rngs: for the initial weights; under `nnx.eval_shape` nothing is allocated.
    """

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        check(
            jnp.dtype(dtype) != jnp.float64 or jax.dtypes.canonicalize_dtype(dtype) == jnp.float64,
            "dtype is float64, which needs jax_enable_x64 (JAX would silently compute in float32)",
        )
        self.config = config
        self.dtype = jnp.dtype(dtype)
        embedding = jax.random.normal(rngs.params(), (config.vocab_size, config.d_model), dtype)
        self.embedding = nnx.Param(embedding * jnp.asarray(config.d_model**-0.5, dtype))
        self.layers = nnx.List(DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, config.rms_eps, dtype=dtype)
        if config.tie_embeddings:
            self.lm_head = None
        else:
            head = jax.random.normal(rngs.params(), (config.d_model, config.vocab_size), dtype)
            self.lm_head = nnx.Param(head * jnp.asarray(config.d_model**-0.5, dtype))

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, caches: Sequence[Any], attend: Attend
    ) -> tuple[jax.Array, list[Any]]:
        """Hidden states of one thread's tokens.

        Args:
          tokens: i32[T].
          positions: i32[T], the rotary position of each token.
          caches: one a layer, handed to `attend` and taken back; None each where attend keeps nothing.
          attend: see `Attend`.

        Returns:
          Normalized hidden states [T, D] in the decoder's dtype, and the layers' caches.
        """
        assert len(caches) == len(self.layers), f"{len(caches)} caches for {len(self.layers)} layers"
        with jax.named_scope("embed"):
            x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
            table = rope_table(self.config.rope, self.config.head_dim, positions, accumulation_dtype(self.dtype))
            table = jax.lax.optimization_barrier(table)  # or XLA computes the cosines again in every layer
        new_caches = []
        for layer_idx, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            with jax.named_scope(f"layer_{layer_idx}"):
                x, cache = layer(x, table, cache, attend)
            new_caches.append(cache)
        return self.final_norm(x), new_caches

    @property
    def num_params(self) -> int:
        """Numbers in all parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def logits(self, hidden: jax.Array, head: jax.Array | None = None) -> jax.Array:
        """Maps hidden: [..., D] to logits [..., V] in float32, or float64 when the decoder is.

        Args:
          head: [D, V] what `transposed_head` returned; None: the weights as they lie.
        """
        wide = accumulation_dtype(self.dtype)
        with jax.named_scope("logits"):
            if head is None and self.lm_head is not None:
                head = self.lm_head[...]
            equation, weights = ("...d,vd->...v", self.embedding[...]) if head is None else ("...d,dv->...v", head)
            return jnp.einsum(
                equation,
                hidden,
                weights,
                preferred_element_type=wide,
                precision=matmul_precision(hidden.dtype),
            )

    def transposed_head(self) -> jax.Array:
        """The weights of the logits as [D, V]: a loop on a CPU would transpose tied ones at every step."""
        return self.embedding[...].T if self.lm_head is None else self.lm_head[...]
