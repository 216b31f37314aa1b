"""The engine on each Pallas backend, interpreted: what it says is what it says on the reference."""

import pytest

from apr_jax import SamplingParams
from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine.attend import Kernels
from apr_jax.engine.engine import EngineCore
from apr_jax.engine.runner import Runner
from apr_jax.testing.tiny import byte_tokenizer, tiny_config, tiny_decoder

CONFIG = tiny_config(num_layers=1, head_dim=64, num_heads=4, num_kv_heads=2)
CACHE = CacheConfig(page_size=16, num_pages=24)
ENGINE = EngineConfig(max_threads=4, prefill_rows=2, prefill_chunk=32, steps_per_dispatch=2, item_pages=2,
                      max_tail_pages=2, max_partials=8, min_shared_tokens=16)  # fmt: skip


def say(kernels: Kernels) -> list[list[int]]:
    """A prompt forked in three, of unequal lengths, joined, and gone on from."""
    decoder = tiny_decoder(CONFIG)
    runner = Runner(CONFIG, decoder, CACHE, ENGINE, kernels)
    engine = EngineCore(CONFIG, decoder, byte_tokenizer(), cache_config=CACHE, engine_config=ENGINE, runner=runner)

    def greedy(count: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=count, ignore_eos=True)

    root = engine.submit(list(range(40, 77)), sampling=greedy(3))
    engine.run()
    kids = engine.fork(root, [[7], [8, 9], list(range(20))], sampling=[greedy(n) for n in (2, 5, 3)])
    engine.run()
    engine.join(root, kids, mode="stitch", tokens=[11, 12], sampling=greedy(4))
    engine.run()
    said = [thread.token_ids for thread in (root, *kids)]
    return said


@pytest.mark.slow
@pytest.mark.usefixtures("light_compilation")
@pytest.mark.parametrize("backend", ["tpu", "gpu_triton"])
def test_what_is_said_does_not_depend_on_the_backend(backend):
    assert say(Kernels(backend, interpret=True)) == say(Kernels())
