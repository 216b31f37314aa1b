"""The steps' arguments: real shapes, nothing allocated."""

import re

import jax
import jax.numpy as jnp
import pytest
from apr_kernels.paged_attention import tuning

from apr_jax.aot.target import find_target
from apr_jax.aot.workload import Contexts, Workload, make_workload, pool_pages
from apr_jax.config import EngineConfig
from apr_jax.models.params import param_shapes
from apr_jax.models.presets import PRESETS
from apr_jax.testing import tiny_config


# Parameters as the models' cards and checkpoints count them; tied embeddings once.
@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_32b", 32_762_123_264),
    ],
)
def test_presets_have_the_published_sizes(name, num_params):
    assert sum(x.size for x in param_shapes(PRESETS[name], jnp.bfloat16).values()) == num_params


def workload(contexts: Contexts, *, num_pages=1000, own_config=None, **engine) -> Workload:
    config = own_config or tiny_config(head_dim=64, max_position=4096)
    fields = {"max_threads": contexts.threads, "prefill_chunk": 32, "attention": "reference"} | engine
    return make_workload(find_target("h200"), jax.devices(), config, EngineConfig(**fields), contexts, 16, num_pages)


def test_a_pool_fills_the_memory_beside_the_weights():
    target, engine = find_target("v5e:2x4"), EngineConfig(dtype="bfloat16", tensor=8)
    page = 16 * 36 * 2 * 8 * 128 * 2  # tokens, layers, keys and values, heads, head_dim, bytes
    used = 2 * 8_190_735_360 + page * pool_pages(target, PRESETS["qwen3_8b"], engine, 16)
    assert 0 <= 0.8 * 8 * target.device_memory - used < page
    assert pool_pages(find_target("v6e:2x2"), PRESETS["llama3_70b"], EngineConfig(dtype="bfloat16"), 16) == 0


@pytest.mark.parametrize(
    ("target", "kv_dtype", "message"),
    [
        ("a100", "float8_e4m3fn", "float8_e4m3fn needs compute capability 8.9"),
        ("v5e:2x4", "float16", "dtype float16, must be one of bfloat16, float32, int8, float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("attention", ["auto", "pallas"])
def test_a_device_whose_kernels_do_not_serve_the_pages_is_refused(target, kv_dtype, message, attention):
    """The engine would take the reference; who compiles for a device asks for its kernels."""
    engine = EngineConfig(max_threads=8, attention=attention, kv_dtype=kv_dtype)
    contexts = Contexts(threads=8, context=100, own=20)
    with pytest.raises(ValueError, match=f"attention={attention}: .*{message}"):
        make_workload(find_target(target), jax.devices(), tiny_config(head_dim=64), engine, contexts, 16, 1000)


@pytest.mark.parametrize(("target", "cores"), [("v4:2x2x1", 2), ("v5p:2x2x1", 2), ("v5e:2x4", 1), ("tpu7x:2x2x1", 1)])
def test_kernels_are_cut_for_the_cores_of_the_chip(target, cores, monkeypatch):
    """What is compiled here, where there is no TPU, must be what the chip runs."""
    seen, choose = [], tuning.tpu_blocks
    monkeypatch.setattr(tuning, "tpu_blocks", lambda *args, **kw: seen.append(kw["cores"]) or choose(*args, **kw))
    contexts = Contexts(threads=8, context=100, own=20)
    engine = EngineConfig(max_threads=8, prefill_chunk=32)
    config = tiny_config(head_dim=64, max_position=4096)
    for step in make_workload(find_target(target), jax.devices(), config, engine, contexts, 16, 1000).steps:
        step.function.trace(*step.args)
    assert set(seen) == {cores}


def test_bytes_to_read():
    contexts = Contexts(threads=8, context=100, own=20)
    assert contexts.unique_tokens == 80 + 8 * 20
    config = tiny_config(head_dim=64, max_position=4096, tie_embeddings=False)
    made = workload(contexts, own_config=config)
    token = 2 * 4 * config.num_kv_heads * 64 * config.num_layers
    assert made.token_bytes == token
    assert contexts.pages(16, 32) == 1 + 80 // 16 + 8 * 32
    prefill, decode = made.steps
    weights = {name: 4 * x.size for name, x in param_shapes(config, jnp.float32).items()}
    total = sum(weights.values())
    assert made.read_bytes(decode) == total - weights["embedding"] + 240 * token
    unread = weights["embedding"] + weights["lm_head"] + weights["final_norm.scale"]
    assert made.read_bytes(prefill) == total - unread + (80 + 4 * 20) * token


def test_arguments_are_shapes():
    made = workload(Contexts(threads=8, context=100, own=20))
    for step in made.steps:
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(step.args))
    tokens = made.steps[0].args[4]
    assert tokens.shape == (4, 32)


@pytest.mark.parametrize(
    ("contexts", "changes", "message"),
    [
        ({"threads": 0}, {}, "threads is 0, must be >= 1"),
        ({"own": 101}, {}, "own is 101, must be in [0, context = 100]"),
        ({"context": 4096}, {}, "context is 4096, the model's window is 4096 tokens"),
        ({"context": 1000, "own": 512}, {}, "own is 512, a tail has room for 511"),
        ({}, {"num_pages": 261}, "num_pages is 261, the contexts need 262"),
        ({}, {"tensor": 3}, "tensor is 3, it must divide num_heads"),
        ({}, {"attention": "pallas", "kv_dtype": "float64"}, "attention=pallas: no Pallas kernel"),
        ({}, {"prefill_chunk": 513}, "a prefill chunk of 513 tokens, a tail has room for 512"),
    ],
)
def test_refused(contexts, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        workload(Contexts(**({"threads": 8, "context": 100, "own": 20} | contexts)), **changes)
