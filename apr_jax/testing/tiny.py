"""A model small enough for any test, and a tokenizer that needs no file."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from apr_jax.config import ModelConfig
from apr_jax.models.decoder import Decoder
from apr_jax.models.params import build_decoder, param_shapes
from apr_jax.tokenizers import ByteTokenizer

MULTIVERSE_TAGS = tuple(
    f"<{slash}{name}>" for name in ("Parallel", "Goal", "Outline", "Path", "Conclusion") for slash in ("", "/")
)


def byte_tokenizer() -> ByteTokenizer:
    """Bytes, with every Multiverse tag as one token."""
    return ByteTokenizer(MULTIVERSE_TAGS)


def tiny_config(**overrides: Any) -> ModelConfig:
    """Two layers, grouped heads, the vocabulary of `byte_tokenizer()`; any field may be overridden."""
    tokenizer = byte_tokenizer()
    fields: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "d_ff": 48,
        "max_position": 1024,
        "bos_id": tokenizer.bos_id,
        "eos_ids": tokenizer.eos_ids,
    }
    return ModelConfig(**(fields | overrides))


def tiny_decoder(config: ModelConfig | None = None, seed: int = 0, dtype=jnp.float32) -> Decoder:
    """A decoder with random weights, large enough that logits spread and attention is not uniform.

    Every array is drawn, norms and biases too, so that a test notices one that is left out. The values do not
    depend on dtype: a narrower one rounds them.
    """
    config = config or tiny_config()
    rng = np.random.default_rng(seed)
    shapes = param_shapes(config, dtype)
    drawn = {name: _draw(rng, shape.shape).astype(shape.dtype) for name, shape in shapes.items()}
    return build_decoder(config, dtype, lambda name: jnp.asarray(drawn[name]))


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape, np.float32)
    if len(shape) == 1:  # norm scales and biases
        return 1.0 + 0.3 * noise
    return noise * np.float32(1.7 * min(shape) ** -0.5)
