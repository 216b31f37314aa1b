"""Eight devices say what one says. In a process of its own, as the number of virtual devices is set at start."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import jax
jax.config.update("jax_enable_x64", True)
from apr_jax import SamplingParams
from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine.engine import EngineCore
from apr_jax.testing.tiny import byte_tokenizer, tiny_config, tiny_decoder
import jax.numpy as jnp

def say(tensor, kv_dtype):
    config = tiny_config(num_heads=16, num_kv_heads=8, d_ff=128, vocab_size=320, qkv_bias=True,
                         tie_embeddings=tensor_tied)
    decoder = tiny_decoder(config, dtype=jnp.float64)
    engine = EngineCore(config, decoder, byte_tokenizer(), cache_config=CacheConfig(page_size=4, num_pages=64),
                        engine_config=EngineConfig(dtype="float64", kv_dtype=kv_dtype, tensor=tensor, max_threads=8,
                                                   min_shared_tokens=8, prefill_chunk=16, steps_per_dispatch=4))
    greedy = SamplingParams(max_new_tokens=9, ignore_eos=True)
    root = engine.submit(list(range(30, 51)), sampling=greedy)
    engine.run()
    drawn = SamplingParams(max_new_tokens=7, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
    kids = engine.fork(root, [[7], [8], [9, 10]], sampling=drawn)
    engine.run()
    engine.join(root, kids, mode="stitch", tokens=[11, 12], sampling=greedy)
    engine.run()
    layer = engine.runner.pages[0].k
    assert len(layer.sharding.device_set) == tensor, layer.sharding
    assert {s.data.shape[0] for s in layer.addressable_shards} == {8 // tensor}
    return [thread.token_ids for thread in (root, *kids)]

tensor_tied, kv_dtype = json.loads(sys.argv[1])
print(json.dumps([say(tensor, kv_dtype) for tensor in (1, 2, 8)]))
"""


def _run(program: str, *args: str) -> subprocess.CompletedProcess:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling takes most of the time
    return subprocess.run([sys.executable, "-c", program, *args], env=env, capture_output=True, text=True, timeout=600)


ALL = pytest.mark.exhaustive  # most of a minute a case: each value is in one that always runs


@pytest.mark.parametrize(
    ("tied", "kv_dtype"),
    [(False, None), (True, "int8"), pytest.param(True, None, marks=ALL), pytest.param(False, "int8", marks=ALL)],
)
def test_many_devices_say_what_one_says(tied, kv_dtype):
    done = _run(PROGRAM, json.dumps([tied, kv_dtype]))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two, eight = json.loads(done.stdout.splitlines()[-1])
    assert len(one[0]) == 9 + 2 + 9
    assert two == one
    assert eight == one


def test_what_cannot_be_split_is_refused():
    few_heads = PROGRAM.partition("tensor_tied, kv_dtype = json")[0].replace("num_kv_heads=8", "num_kv_heads=4")
    done = _run(few_heads + "tensor_tied = True; say(8, None)")
    assert done.returncode != 0
    assert "tensor is 8, it must divide num_kv_heads = 4" in done.stderr
