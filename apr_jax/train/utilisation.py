"""How much of a device a training step uses: the arithmetic of a step, and the speed of a large matmul.

The speed is measured, not taken from a data sheet: so it is known for any device, and is that of the cores and the
precision that the run has.
"""

import functools
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from apr_jax.config import ModelConfig
from apr_jax.models.layers import matmul_precision

CPU_SIZE, ACCELERATOR_SIZE = 1024, 8192
REPEATS = 5


def step_flops(config: ModelConfig, num_params: int, rows: Mapping[int, int]) -> float:
    """Floating-point operations of a step's products, forward and backward.

    Six for each token and parameter (tied embeddings are the logits' weights); in every layer, for each query and each
    key up to it, twelve for each of the heads' dimensions. Padding counts: it is computed as well.

    Args:
      rows: how many there are of each length.

    Source: Chowdhery et al. 2022, PaLM (arXiv 2204.02311), appendix B, with half of the attention left out as causal.
    """
    if not config.tie_embeddings:
        num_params -= config.vocab_size * config.d_model  # looked up
    width = config.num_layers * config.num_heads * config.head_dim
    return float(sum(count * length * (6 * num_params + 6 * width * length) for length, count in rows.items()))


@functools.cache
def matmul_flops_per_s(dtype: str) -> float:
    """Operations a second that the first device reaches in a large square matmul, as exact as a model's: the best of a
    few.
    """
    size = CPU_SIZE if jax.default_backend() == "cpu" else ACCELERATOR_SIZE
    a = jnp.ones((size, size), dtype)
    product = jax.jit(functools.partial(jnp.matmul, precision=matmul_precision(dtype)))
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)
