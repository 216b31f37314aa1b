"""The decoder in each dtype, under vmap, under grad; dense attention; what compiles."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.config import ModelConfig, RopeConfig
from apr_jax.models.decoder import Decoder
from apr_jax.models.dense import dense_attend, dense_logits
from apr_jax.models.params import build_decoder, named_params, param_shapes
from apr_jax.testing import tiny_config, tiny_decoder

EVERYTHING = {
    "num_heads": 6,
    "num_kv_heads": 3,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
    "rope": RopeConfig(kind="yarn", factor=4.0, original_max_position=16),
}
NUM_TOKENS = 20


def logits_of(decoder, *args):
    return jax.jit(lambda *args: dense_logits(decoder, *args))(*args)


def inputs(num_tokens=NUM_TOKENS):
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 256, num_tokens), jnp.int32)
    positions = jnp.arange(num_tokens, dtype=jnp.int32)
    return tokens, positions, positions[:, None] >= positions[None, :]


def numpy_attention(q, k, v, mask):
    """Attention head by head in float64, with keys and values repeated."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        scores = np.where(mask, q[:, head] @ k[:, head // group].T / np.sqrt(q.shape[2]), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // group]
    return out


def test_float64_is_float64_throughout():
    """The engine's storm tests compare tokens exactly, which a hidden float32 would spoil."""
    with jax.enable_x64(True):
        decoder = tiny_decoder(tiny_config(**EVERYTHING), dtype=jnp.float64)
        jaxpr = jax.make_jaxpr(lambda *args: dense_logits(decoder, *args))(*inputs())
        assert "f32" not in str(jaxpr) and "bf16" not in str(jaxpr)
        wide = logits_of(decoder, *inputs())
        assert wide.dtype == jnp.float64
    narrow = logits_of(tiny_decoder(tiny_config(**EVERYTHING)), *inputs())
    np.testing.assert_allclose(narrow, np.asarray(wide), atol=2e-4, rtol=0)
    with pytest.raises(ValueError, match="dtype is float64, which needs jax_enable_x64"):
        Decoder(tiny_config(), dtype=jnp.float64, rngs=nnx.Rngs(0))


def test_bfloat16_keeps_float32_where_it_matters():
    decoder = tiny_decoder(tiny_config(**EVERYTHING), dtype=jnp.bfloat16)
    assert {str(array.dtype) for array in named_params(decoder).values()} == {"bfloat16"}
    logits = logits_of(decoder, *inputs())
    assert logits.dtype == jnp.float32
    exact = logits_of(tiny_decoder(tiny_config(**EVERYTHING)), *inputs())
    assert jnp.sqrt(jnp.mean((logits - exact) ** 2)) < 0.03 * jnp.std(exact)


def test_threads_by_vmap_equal_one_by_one_and_fold_into_the_products():
    decoder = tiny_decoder(tiny_config(**EVERYTHING))
    tokens, positions, mask = inputs(8)
    threads = jnp.stack([tokens, tokens[::-1], tokens + 1])
    together = jax.vmap(lambda row: dense_logits(decoder, row, positions, mask))
    for row, logits in zip(threads, jax.jit(together)(threads)):
        np.testing.assert_allclose(logits, logits_of(decoder, row, positions, mask), atol=1e-5, rtol=0)
    # Each weight multiplies all threads at once: no product carries the thread axis as a batch dimension but
    # attention's own two a layer.
    jaxpr = jax.make_jaxpr(together)(threads)
    batched = [
        eqn.params["dimension_numbers"][1]
        for eqn in nested_equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general" and eqn.params["dimension_numbers"][1] != ((), ())
    ]
    assert len(batched) == 2 * decoder.config.num_layers


def nested_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from nested_equations(inner)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_dense_attention_equals_numpy(num_kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    q = 5 * jax.random.normal(keys[0], (NUM_TOKENS, 6, 16))
    k, v = (jax.random.normal(key, (NUM_TOKENS, num_kv_heads, 16)) for key in keys[1:3])
    mask = jax.random.bernoulli(keys[3], 0.4, (NUM_TOKENS, NUM_TOKENS)) | jnp.eye(NUM_TOKENS, dtype=bool)
    o, cache = dense_attend(mask)(q, k, v, "cache")
    assert cache == "cache"
    np.testing.assert_allclose(o, numpy_attention(q, k, v, mask), atol=1e-5, rtol=0)
    blind = mask.at[3].set(False)
    o, _ = dense_attend(blind)(q, k, v, None)
    assert not o[3].any() and jnp.isfinite(o).all()


def test_gradients_are_finite_and_reach_every_parameter():
    graph, state = nnx.split(tiny_decoder(tiny_config(**EVERYTHING)))
    tokens, positions, mask = inputs()

    def loss(state):
        logits = dense_logits(nnx.merge(graph, state), tokens, positions, mask.at[3].set(False))
        return -jax.nn.log_softmax(logits)[jnp.arange(NUM_TOKENS - 1), tokens[1:]].mean()

    gradients = jax.jit(jax.grad(loss))(state)
    for path, gradient in nnx.to_flat_state(gradients):
        # A key's bias shifts all scores of a query alike where keys are not normed or rotated: not so here.
        assert jnp.isfinite(gradient[...]).all() and jnp.abs(gradient[...]).max() > 1e-7, path


def test_abstract_decoders_allocate_nothing_and_parameters_come_back_by_name():
    config = tiny_config(tie_embeddings=True, d_model=1 << 20, d_ff=1 << 22, num_layers=3)  # terabytes
    shapes = param_shapes(config, jnp.bfloat16)
    assert shapes["layers.2.mlp.gate.kernel"].shape == (1 << 20, 1 << 22)
    assert "lm_head" not in shapes
    decoder = tiny_decoder(seed=5)
    copy = build_decoder(decoder.config, jnp.float32, named_params(decoder).__getitem__)
    assert jnp.array_equal(logits_of(copy, *inputs()), logits_of(decoder, *inputs()))
    assert decoder.num_params == sum(array.size for array in named_params(decoder).values())


def test_initial_logits_have_the_scale_that_training_starts_from():
    decoder = Decoder(tiny_config(d_model=96), rngs=nnx.Rngs(0))
    assert 0.5 < logits_of(decoder, *inputs()).std() < 2.0


def test_rope_settings_that_cannot_be_computed_are_refused():
    with pytest.raises(ValueError, match="'llama3' has original_max_position None, must be >= 1"):
        RopeConfig(kind="llama3", factor=8.0)
    with pytest.raises(ValueError, match="head_dim is 15, must be even"):
        ModelConfig(
            vocab_size=9,
            d_model=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=15,
            d_ff=8,
            max_position=9,
        )
