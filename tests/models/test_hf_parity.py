"""Every family gives the logits and greedy tokens of transformers, and survives conversion and export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import FAMILIES, load_reference, make_model

from apr_jax.models.checkpoint import load_decoder, save_checkpoint
from apr_jax.models.decoder import Decoder
from apr_jax.models.dense import dense_logits
from apr_jax.models.hf import export_hf, load_hf
from apr_jax.models.params import named_params

torch = pytest.importorskip("torch")
NUM_TOKENS = 100  # beyond the original windows of the yarn and llama3 models
NUM_GREEDY = 64


def causal_logits(decoder: Decoder, tokens: np.ndarray) -> jax.Array:
    positions = jnp.arange(len(tokens))
    return dense_logits(decoder, jnp.asarray(tokens), positions, positions[:, None] >= positions[None, :])


def greedy_tokens(decoder: Decoder, prompt: np.ndarray) -> list[int]:
    """Decodes with one dense forward pass a token, at a fixed padded length."""
    length = len(prompt) + NUM_GREEDY

    @jax.jit
    def decode(prompt):
        def step(i, tokens):
            return tokens.at[i].set(jnp.argmax(causal_logits(decoder, tokens)[i - 1]))

        return jax.lax.fori_loop(len(prompt), length, step, jnp.zeros(length, jnp.int32).at[: len(prompt)].set(prompt))

    return decode(jnp.asarray(prompt, jnp.int32))[len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers(tmp_path, family):
    reference = make_model(family, tmp_path / "hf")
    num_files = len(list((tmp_path / "hf").glob("*.safetensors")))
    assert num_files == FAMILIES[family][3]
    stored = load_hf(tmp_path / "hf")
    assert str(stored.dtype) == FAMILIES[family][2]
    decoder = load_hf(tmp_path / "hf", "float32")
    assert decoder.config.eos_ids == (2, 7)

    tokens = np.random.default_rng(0).integers(0, 131, NUM_TOKENS)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(causal_logits(decoder, tokens), expected, atol=1e-4, rtol=0)

    prompt = tokens[:40]
    sampled = reference.generate(
        torch.from_numpy(prompt)[None],
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=NUM_GREEDY,
        do_sample=False,
        eos_token_id=None,
    )
    assert greedy_tokens(decoder, prompt) == sampled[0, 40:].tolist()

    # There and back: convert, read the checkpoint, export it, and let transformers load that.
    save_checkpoint(tmp_path / "own", stored)
    export_hf(tmp_path / "back", load_decoder(tmp_path / "own"), max_shard_bytes=100_000)
    assert (tmp_path / "back" / "model.safetensors.index.json").exists()
    returned = load_reference(tmp_path / "back")
    assert returned.config.architectures == reference.config.architectures
    weights = returned.state_dict()
    assert weights.keys() == reference.state_dict().keys()
    for name, array in reference.state_dict().items():
        assert torch.equal(array, weights[name]), name
    with torch.no_grad():
        assert torch.equal(
            returned(torch.from_numpy(tokens)[None]).logits, reference(torch.from_numpy(tokens)[None]).logits
        )
    again = load_hf(tmp_path / "back")
    assert (again.config, again.dtype) == (stored.config, stored.dtype)
    for name, array in named_params(stored).items():
        assert (array == named_params(again)[name]).all()
