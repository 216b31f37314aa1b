"""Initial number embeddings that make arithmetic easy to learn: waves over n and over log n.

With cos(w n) and sin(w n) in the embedding, sums and differences are products of features, which a gated MLP
computes in one layer; over log n the same holds for products and quotients. Only the start of training is
affected: all of it is trained.
"""

import numpy as np

from apr_jax.tasks.countdown_vocabulary import BARE_NUMBERS, GOALS, LISTED, NUMBERS, RESULTS, TARGETS, vocabulary

PERIODS = (2, 3, 4, 5, 7, 9, 10, 11, 13, 17, 20, 23, 29, 40, 50, 67, 100, 133, 200, 400)
LOG_PERIODS = (0.02, 0.03, 0.05, 0.08, 0.13, 0.21, 0.34, 0.55, 0.9, 1.5, 2.5, 5.5)


def initial_embedding(d_model: int, seed: int) -> np.ndarray:
    """Embeddings [V, d_model] of unit length: waves in the first dimensions, noise in the rest.

    Raises:
      ValueError: d_model too small for the waves.
    """
    num_waves = 2 * (len(PERIODS) + len(LOG_PERIODS))
    if d_model < num_waves:
        raise ValueError(f"d_model is {d_model}, must be >= {num_waves} for the waves")
    pieces = vocabulary()
    table = np.random.default_rng(seed).normal(0.0, d_model**-0.5, (len(pieces), d_model))
    n = np.arange(len(NUMBERS))[:, None]
    turns = [n / np.asarray(PERIODS), np.log(np.maximum(n, 0.5)) / np.asarray(LOG_PERIODS)]
    phases = 2 * np.pi * np.concatenate(turns, axis=1)
    waves = np.concatenate([np.cos(phases), np.sin(phases)], axis=1)
    for numbers in (NUMBERS, BARE_NUMBERS, LISTED, RESULTS, TARGETS, GOALS):
        first = pieces.index(numbers[0])
        table[first : first + len(numbers), :num_waves] = waves[: len(numbers)] * d_model**-0.5 * 2**0.5
    return (table / np.linalg.norm(table, axis=1, keepdims=True)).astype(np.float32)
