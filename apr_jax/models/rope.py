"""Rotary positions, as Hugging Face transformers computes them. Letters: T tokens, N heads, Dh head_dim.

The rotation pairs dimension i with i + Dh / 2 ("rotate half"). Tables are computed once a forward pass and
shared by all layers, in float32, or in float64 when the decoder is.

Source: `modeling_rope_utils.py` of Hugging Face transformers; YaRN is arXiv 2309.00071.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, dtype: np.dtype) -> tuple[np.ndarray, float]:
    """The angle a token turns by per position, for each pair of dimensions.

    Args:
      rope: the scaling.
      head_dim: Dh.
      dtype: float32 or float64; the arithmetic is done in it, as transformers does it in float32.

    Returns:
      Frequencies [Dh / 2] in radians a position, and the factor that multiplies cos and sin.

    Raises:
      ValueError: a llama3 or yarn scaling without `original_max_position`.
    """
    exponents = np.arange(0, head_dim, 2).astype(dtype) / dtype.type(head_dim)
    base = dtype.type(rope.theta)
    frequencies = dtype.type(1.0) / base**exponents
    if rope.kind == "linear":
        return frequencies / dtype.type(rope.factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, frequencies).astype(dtype), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, frequencies).astype(dtype), _yarn_attention_factor(rope)
    return frequencies, 1.0


def rope_table(rope: RopeConfig, head_dim: int, positions: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every token's angles.

    Args:
      positions: i32[T].
      dtype: float32 or float64.

    Returns:
      Two arrays [T, 1, Dh / 2] of `dtype`, which broadcast over heads.
    """
    frequencies, factor = inverse_frequencies(rope, head_dim, np.dtype(dtype))
    angles = positions.astype(dtype)[:, None, None] * jnp.asarray(frequencies, dtype)
    return jnp.cos(angles) * jnp.asarray(factor, dtype), jnp.sin(angles) * jnp.asarray(factor, dtype)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x: [T, N, Dh] by the table's angles, in the table's dtype; returns x's dtype."""
    cos, sin = table
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Slow dimensions are slowed further by `factor`, fast ones kept, those between blended."""
    original = rope.original_max_position
    assert original is not None
    wavelengths = 2 * math.pi / frequencies
    low_wavelength, high_wavelength = original / rope.low_freq_factor, original / rope.high_freq_factor
    scaled = np.where(wavelengths > low_wavelength, frequencies / rope.factor, frequencies)
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    medium = (wavelengths >= high_wavelength) & (wavelengths <= low_wavelength)
    return np.where(medium, blended, scaled)


def _yarn(rope: RopeConfig, head_dim: int, frequencies: np.ndarray) -> np.ndarray:
    """Keeps dimensions that turn often over the original window, interpolates those that turn rarely."""
    original = rope.original_max_position
    assert original is not None

    def correction_dim(num_rotations: float) -> float:
        return head_dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    dtype = frequencies.dtype
    ramp = np.clip((np.arange(head_dim // 2).astype(dtype) - dtype.type(low)) / dtype.type(high - low), 0, 1)
    keep = 1 - ramp
    return frequencies / dtype.type(rope.factor) * (1 - keep) + frequencies * keep


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """What multiplies cos and sin, so that the softmax keeps its temperature over the longer window."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
