"""What the engine says equals the argmax of one dense forward pass over the whole tree, mask and positions explicit.

The oracle replays a finished family from its threads' tokens alone (`apr_jax.testing.replay`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenarios import Family, drive

from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine.engine import EngineCore
from apr_jax.models.dense import dense_logits
from apr_jax.testing import byte_tokenizer, tiny_config, tiny_decoder
from apr_jax.testing.replay import Replay

MODEL = tiny_config(vocab_size=40, eos_ids=(0,), max_position=2048)
PADDED = 1024


@pytest.mark.slow
def test_greedy_tokens_are_the_dense_argmax():
    with jax.enable_x64(True):
        decoder = tiny_decoder(MODEL, 1, jnp.float64)
        engine = EngineCore(
            MODEL,
            decoder,
            byte_tokenizer(),
            cache_config=CacheConfig(page_size=8, num_pages=400),
            engine_config=EngineConfig(
                dtype="float64", max_threads=8, steps_per_dispatch=8, prefill_chunk=32, max_tail_pages=4
            ),
        )
        families = [Family(seed, 40, greedy=True) for seed in range(100, 124)]
        drive(engine, families)
        forward = jax.jit(lambda tokens, positions, mask: dense_logits(decoder, tokens, positions, mask))
        checked = 0
        for family in families:
            replay = Replay(family.marks)
            replay.thread(family.root, [], 0)
            best = np.asarray(forward(*replay.arrays(PADDED))).argmax(-1)
            for entry, token in replay.sampled:
                assert best[entry] == token, f"seed {family.seed}: entry {entry} of {len(replay.tokens)}"
            checked += len(replay.sampled)
        assert checked > 1000
