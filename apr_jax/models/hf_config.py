"""Hugging Face's config.json to and from ModelConfig.

Defaults for keys that a file leaves out are those of the configuration classes in transformers.
"""

import dataclasses
from typing import Any

from apr_jax.config import ROPE_KINDS, ModelConfig, RopeConfig, check

ARCHITECTURES = {  # Hugging Face class -> model_type
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_HEAD_DIM = {"qwen3": 128}


def model_config_from_hf(hf: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """The architecture that a config.json describes.

    Args:
      hf: config.json.
      generation: generation_config.json; its end tokens count too.

    Raises:
      ValueError: the architecture, the scaling or another setting is not supported; the message names it,
        what was found and what was expected.
    """
    architecture = _architecture(hf)
    model_type = ARCHITECTURES[architecture]
    missing = [key for key in _REQUIRED if hf.get(key) is None]
    check(not missing, f"config.json lacks {', '.join(missing)}")
    for key, least in _INTEGERS.items():
        _check_number(key, hf.get(key), int, least)
    for key in ("rms_norm_eps", "rope_theta"):
        _check_number(key, hf.get(key), float, 0)
    _refuse_unsupported(hf, model_type)
    num_heads = hf["num_attention_heads"]
    attention_bias = model_type in ("llama", "qwen3") and bool(hf.get("attention_bias", False))
    kv_heads = hf.get("num_key_value_heads", _DEFAULT_KV_HEADS.get(model_type, num_heads))
    head_dim = hf.get("head_dim") or _DEFAULT_HEAD_DIM.get(model_type) or hf["hidden_size"] // num_heads
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        d_model=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        d_ff=hf["intermediate_size"],
        max_position=hf["max_position_embeddings"],
        rms_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or model_type == "qwen2",
        out_bias=attention_bias,
        mlp_bias=model_type == "llama" and bool(hf.get("mlp_bias", False)),
        qk_norm=model_type == "qwen3",
        rope=_rope(hf),
        bos_id=hf.get("bos_token_id"),
        eos_ids=_eos_ids(hf, generation or {}),
        architecture=architecture,
    )


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model, in the form that transformers 4 and 5 read.

    Raises:
      ValueError: the Hugging Face class cannot express the architecture.
    """
    check(
        config.architecture in ARCHITECTURES,
        f"architecture is {config.architecture!r}, expected one of {', '.join(ARCHITECTURES)}",
    )
    hf: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": ARCHITECTURES[config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_hf(config.rope),
        "torch_dtype": dtype,
    }
    if hf["model_type"] in ("llama", "qwen3"):
        hf["attention_bias"] = config.qkv_bias
    if hf["model_type"] == "llama":
        hf["mlp_bias"] = config.mlp_bias
    if hf["model_type"] == "mistral":
        hf["sliding_window"] = None
    readable = model_config_from_hf(hf)
    for field in dataclasses.fields(ModelConfig):
        want, got = getattr(config, field.name), getattr(readable, field.name)
        check(want == got, f"{config.architecture} cannot express {field.name} = {want!r}, only {got!r}")
    return hf


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


_INTEGERS = dict.fromkeys(_REQUIRED, 1) | {
    "num_key_value_heads": 1,
    "head_dim": 1,
    "sliding_window": 0,
    "max_window_layers": 0,
    "original_max_position_embeddings": 1,
    "bos_token_id": 0,
}
_ROPE_NUMBERS = (
    "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow",
)  # fmt: skip


def _check_number(key: str, found: Any, kind: type, least: float) -> None:
    """None is left to the defaults."""
    kinds = (int,) if kind is int else (int, float)
    is_number = isinstance(found, kinds) and not isinstance(found, bool)
    what = "an integer" if kind is int else "a number"
    check(found is None or (is_number and found >= least), f"{key} is {found!r}, expected {what} >= {least}")


def _architecture(hf: dict[str, Any]) -> str:
    found = hf.get("architectures") or []
    check(isinstance(found, list), f"architectures is {found!r}, expected a list of names")
    if not found and hf.get("model_type") in ARCHITECTURES.values():
        return next(name for name, model_type in ARCHITECTURES.items() if model_type == hf["model_type"])
    known = [name for name in found if name in ARCHITECTURES]
    check(
        bool(known),
        f"unknown architecture {', '.join(map(str, found)) or hf.get('model_type')!s}, "
        f"expected one of {', '.join(ARCHITECTURES)}",
    )
    return known[0]


def _refuse_unsupported(hf: dict[str, Any], model_type: str) -> None:
    check(
        hf.get("hidden_act", "silu") in ("silu", "swish"),
        f"hidden_act is {hf.get('hidden_act')!r}, expected 'silu'",
    )
    check(not hf.get("quantization_config"), "quantization_config is set, expected weights in bf16, f16 or f32")
    check(
        hf.get("partial_rotary_factor") in (None, 1, 1.0),
        f"partial_rotary_factor is {hf.get('partial_rotary_factor')}, expected 1",
    )
    num_layers = hf["num_hidden_layers"]
    windowed = [kind for kind in hf.get("layer_types") or [] if kind != "full_attention"]
    check(not windowed, f"layer_types holds {windowed[:1]}, expected 'full_attention' everywhere")
    if model_type == "mistral":
        window, used = hf.get("sliding_window", 4096), True
    elif model_type in ("qwen2", "qwen3"):
        window = hf.get("sliding_window", 4096)
        used = hf.get("use_sliding_window", False) and not hf.get("layer_types")
        used = used and hf.get("max_window_layers", 28) < num_layers
    else:
        window, used = None, False
    if used and window is not None and window < hf["max_position_embeddings"]:
        raise ValueError(
            f"sliding_window is {window} and in use, expected null or at least "
            f"max_position_embeddings = {hf['max_position_embeddings']}: sliding windows are not supported"
        )


def _rope(hf: dict[str, Any]) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (before)."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    check(isinstance(scaling, dict), f"the rope settings are {scaling!r}, expected an object")
    nested = [key for key, value in scaling.items() if isinstance(value, dict)]
    check(not nested, f"rope_parameters differ by layer type ({', '.join(nested)}), expected one for all")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    check(kind in ROPE_KINDS, f"rope scaling {kind!r} is unknown, expected one of {', '.join(ROPE_KINDS)}")
    for key in _ROPE_NUMBERS:
        _check_number(f"rope {key}", scaling.get(key), float, 0)
    theta = scaling.get("rope_theta", hf.get("rope_theta", 10_000.0))
    partial = scaling.get("partial_rotary_factor", 1)
    check(partial == 1, f"partial_rotary_factor is {partial}, expected 1")
    if kind == "default":
        return RopeConfig(theta=theta)
    max_position = hf["max_position_embeddings"]
    key = "original_max_position_embeddings"
    original = hf.get(key) or scaling.get(key) or max_position
    factor = scaling.get("factor")
    if kind == "yarn" and factor is None:
        factor = max_position / original
    required = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": (),
    }
    missing = [key for key in required[kind] if scaling.get(key) is None]
    check(not missing, f"rope scaling {kind!r} lacks {', '.join(missing)}")
    fields: dict[str, Any] = {"kind": kind, "theta": theta, "factor": factor}
    if kind == "llama3":
        fields |= {key: scaling[key] for key in ("low_freq_factor", "high_freq_factor")}
        fields["original_max_position"] = original
    if kind == "yarn":
        fields |= {key: scaling.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")}
        fields["original_max_position"] = original
        fields["beta_fast"] = scaling.get("beta_fast") or 32.0
        fields["beta_slow"] = scaling.get("beta_slow") or 1.0
        fields["truncate"] = scaling.get("truncate", True)
    return RopeConfig(**fields)


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        optional = {key: getattr(rope, key) for key in ("attention_factor", "mscale", "mscale_all_dim")}
        scaling |= {key: value for key, value in optional.items() if value is not None}
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position
    return scaling


def _eos_ids(hf: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    for found in (hf.get("eos_token_id"), generation.get("eos_token_id")):
        several = found if isinstance(found, list) else [found]
        for each in several:
            _check_number("eos_token_id", each, int, 0)
        ids += [each for each in several if each is not None]
    return tuple(dict.fromkeys(ids))
