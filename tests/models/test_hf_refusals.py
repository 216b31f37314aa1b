"""What is wrong with a Hugging Face directory is said by name, with what was found and what was expected."""

import json

import numpy as np
import pytest
import safetensors.numpy

from apr_jax.config import ModelConfig, RopeConfig
from apr_jax.models.hf import export_hf, load_hf
from apr_jax.models.hf_config import ARCHITECTURES, model_config_from_hf, model_config_to_hf
from apr_jax.testing import tiny_config, tiny_decoder

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
}


def of(architecture, **settings):
    return LLAMA | {"architectures": [architecture]} | settings


@pytest.fixture
def directory(tmp_path):
    """A sound directory of two shards, and a way to change its tensors."""
    export_hf(tmp_path / "hf", tiny_decoder(tiny_config(tie_embeddings=True)), max_shard_bytes=40_000)
    return tmp_path / "hf"


def change_tensors(directory, change):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in set(index["weight_map"].values()):
        tensors |= safetensors.numpy.load_file(directory / shard)
        (directory / shard).unlink()
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def test_missing_tensor(directory):
    change_tensors(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight is missing, expected shape \[48, 32\]$"):
        load_hf(directory)


def test_unexpected_tensors(directory):
    change_tensors(directory, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones((3, 4), "f4")}))
    with pytest.raises(ValueError, match=r"tensor model.layers.2.mlp.up_proj.weight of shape \[3, 4\] is unexpected"):
        load_hf(directory)


def test_wrong_shapes(directory):
    change_tensors(directory, lambda t: t.update({"model.norm.weight": np.ones(31, "f4"), "extra": np.ones(1, "f4")}))
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[31\], expected \[32\] \(and 1 more\)"):
        load_hf(directory)


def test_tolerated_tensors(directory):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, "f4")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    change_tensors(directory, add)
    assert load_hf(directory).lm_head is None


def test_tied_head_without_an_embedding(directory):
    change_tensors(directory, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is missing, expected shape"):
        load_hf(directory)


@pytest.mark.parametrize("content", ['{"metadata": {}}', "[]", "{", '{"weight_map": {"a": 1}}'])
def test_index_that_is_none(directory, content):
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json (holds no|is not JSON)"):
        load_hf(directory)


def test_yarn_takes_the_window_where_the_original_is_null():
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": None}
    assert model_config_from_hf(of("LlamaForCausalLM", rope_scaling=scaling)).rope.original_max_position == 128


def test_tied_head_that_differs(directory):
    change_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding, expected none: they are tied"):
        load_hf(directory)


def test_tensors_of_another_dtype(directory):
    change_tensors(directory, lambda t: t.update({"model.norm.weight": np.ones(32, "i1")}))
    with pytest.raises(ValueError, match=r"tensor model.norm.weight is I8, expected one of BF16, F16, F32, F64"):
        load_hf(directory)


def test_shards_that_are_absent_or_truncated(directory):
    shard = sorted(directory.glob("model-0*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{shard.name} is truncated or no safetensors file"):
        load_hf(directory)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"model.safetensors.index.json names {shard.name}, which is missing"):
        load_hf(directory)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        load_hf(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_hf(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_hf(directory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            of("GemmaForCausalLM"),
            "unknown architecture GemmaForCausalLM, expected one of LlamaForCausalLM, Mistral",
        ),
        ({"model_type": "gpt2"}, "unknown architecture gpt2, expected one of"),
        (
            {"architectures": ["LlamaForCausalLM"], "vocab_size": 9},
            "config.json lacks hidden_size, num_hidden_layers",
        ),
        (of("LlamaForCausalLM", hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
        (of("LlamaForCausalLM", quantization_config={"bits": 4}), "quantization_config is set"),
        (of("LlamaForCausalLM", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, expected 1"),
        (
            of("LlamaForCausalLM", rope_scaling={"type": "dynamic", "factor": 2.0}),
            "rope scaling 'dynamic' is unknown, expected one of default, linear, llama3, yarn",
        ),
        (
            of("LlamaForCausalLM", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
            "rope scaling 'longrope' is unknown",
        ),
        (
            of("LlamaForCausalLM", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
            "lacks low_freq_factor, high_f",
        ),
        (
            of("Qwen3ForCausalLM", rope_parameters={"full_attention": {"rope_type": "default"}}),
            r"differ by layer type \(full_attention\)",
        ),
        (
            of("MistralForCausalLM", sliding_window=64),
            "sliding_window is 64 and in use, expected null or at least",
        ),
        (of("MistralForCausalLM", max_position_embeddings=8192), "sliding_window is 4096 and in use"),
        (
            of("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=64, max_window_layers=1),
            "sliding_window is 64 and in use",
        ),
        (of("Qwen3ForCausalLM", layer_types=["full_attention", "sliding_attention"]), "layer_types holds"),
        (of("LlamaForCausalLM", num_attention_heads="six"), "num_attention_heads is 'six', expected an integer >= 1"),
        (of("LlamaForCausalLM", num_attention_heads=0), "num_attention_heads is 0, expected an integer >= 1"),
        (of("LlamaForCausalLM", vocab_size=131.0), "vocab_size is 131.0, expected an integer >= 1"),
        (of("LlamaForCausalLM", rope_parameters=[1]), r"the rope settings are \[1\], expected an object"),
        (
            of("LlamaForCausalLM", rope_scaling={"type": "linear", "factor": "2.5"}),
            "rope factor is '2.5', expected a number >= 0",
        ),
        (
            of(
                "LlamaForCausalLM",
                rope_scaling={"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            ),
            r"rope low_freq_factor is 4.0, must be in \(0, high_freq_factor = 4.0\)",
        ),
        (of("LlamaForCausalLM", eos_token_id="2"), "eos_token_id is '2', expected an integer >= 0"),
        (LLAMA | {"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a list"),
        (
            of("LlamaForCausalLM", num_key_value_heads=3),
            "num_heads is 4, must be a multiple of num_kv_heads = 3",
        ),
    ],
)
def test_configs_that_are_not_supported(config, message):
    with pytest.raises(ValueError, match=message):
        model_config_from_hf(config)


def test_windows_that_are_not_in_use():
    model_config_from_hf(of("MistralForCausalLM", sliding_window=None))
    model_config_from_hf(of("MistralForCausalLM", sliding_window=128))
    model_config_from_hf(of("Qwen2ForCausalLM", use_sliding_window=False, sliding_window=64))
    model_config_from_hf(of("Qwen3ForCausalLM", use_sliding_window=True, sliding_window=64, max_window_layers=2))


def test_defaults_of_old_files():
    config = model_config_from_hf({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"})
    assert (config.num_kv_heads, config.head_dim, config.rms_eps) == (4, 6, 1e-6)
    assert config.rope == RopeConfig(theta=10_000.0)
    assert model_config_from_hf(of("Qwen3ForCausalLM")).head_dim == 128
    assert model_config_from_hf(of("Qwen2ForCausalLM")).qkv_bias


def test_both_forms_of_rope_settings_say_the_same():
    scaling = {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": None,
        "attention_factor": 1.25,
    }
    old = model_config_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "yarn"} | scaling})
    new = model_config_from_hf(LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5} | scaling})
    assert old == new
    expected = {
        "kind": "yarn",
        "theta": 5e5,
        "factor": 4.0,
        "original_max_position": 32,
        "attention_factor": 1.25,
    }
    assert old.rope == RopeConfig(**expected)
    implied = model_config_from_hf(LLAMA | {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 32}})
    assert implied.rope.factor == 4.0  # max_position_embeddings / original


def test_end_tokens_of_both_files():
    generation = {"eos_token_id": [2, 5]}
    assert model_config_from_hf(LLAMA | {"eos_token_id": 2}, generation).eos_ids == (2, 5)
    assert model_config_from_hf(LLAMA | {"eos_token_id": [7, 2]}, {}).eos_ids == (7, 2)
    assert model_config_from_hf(LLAMA, generation).eos_ids == (2, 5)
    assert model_config_from_hf(LLAMA).eos_ids == ()


def test_configs_go_back_and_architectures_that_cannot_express_them_refuse():
    plain = {
        "vocab_size": 64,
        "d_model": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 10,
    }
    plain |= {"d_ff": 32, "max_position": 128, "bos_id": 1, "eos_ids": (2,)}
    for architecture in ARCHITECTURES:
        flags = {
            "qkv_bias": architecture == "Qwen2ForCausalLM",
            "qk_norm": architecture == "Qwen3ForCausalLM",
        }
        config = ModelConfig(**plain, **flags, architecture=architecture)
        assert model_config_from_hf(model_config_to_hf(config, "float32")) == config
    with pytest.raises(ValueError, match="MistralForCausalLM cannot express qkv_bias = True, only False"):
        model_config_to_hf(ModelConfig(**plain, qkv_bias=True, architecture="MistralForCausalLM"), "float32")
    with pytest.raises(ValueError, match="architecture is 'Mine', expected one of LlamaForCausalLM"):
        model_config_to_hf(ModelConfig(**plain, architecture="Mine"), "float32")
