"""Small random models made with transformers, of odd sizes: what the parity tests compare with."""

import sys
from pathlib import Path
from typing import Any

sys.modules.setdefault("kernels", None)  # transformers imports an optional package of that name

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)  # these models are too small to share

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500_000.0,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 48,
    "rope_theta": 10_000.0,
    "mscale": 0.9,
    "mscale_all_dim": 0.4,
    "truncate": False,
}
QWEN_YARN_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 48,
    "rope_theta": 1e6,
}

LINEAR_ROPE = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10_000.0}
QWEN3_ROPE = {"rope_type": "default", "rope_theta": 1e6}

# name -> (class, settings, dtype of the files, shards)
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "llama2": ("Llama", {"hidden_size": 96, "num_key_value_heads": 6, "head_dim": None}, "float16", 1),
    "llama3": (
        "Llama",
        {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
        "bfloat16",
        2,
    ),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR_ROPE}, "float32", 1),
    "llama_yarn": ("Llama", {"rope_parameters": YARN_ROPE}, "float32", 2),
    "mistral": ("Mistral", {"sliding_window": None}, "float32", 1),
    "qwen2": ("Qwen2", {"hidden_size": 288, "tie_word_embeddings": True}, "float32", 1),
    "qwen25_yarn": ("Qwen2", {"hidden_size": 288, "rope_parameters": QWEN_YARN_ROPE}, "bfloat16", 1),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "rope_parameters": QWEN3_ROPE}, "float32", 2),
}


def make_model(family: str, directory: Path):
    """Saves a random model of a family; returns it as transformers reads it back, in float32."""
    kind, settings, dtype, num_shards = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": 131,
            "hidden_size": 90,
            "intermediate_size": 77,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 48,
            "max_position_embeddings": 192,
            "bos_token_id": 1,
            "eos_token_id": [2, 7],
        }
        | settings
    )
    torch.manual_seed(len(family))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # large enough that nothing is near uniform, and that norms and biases matter
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if "norm" in name or "bias" in name else 0.12)
    size = sum(p.numel() for p in model.parameters()) * (4 if dtype == "float32" else 2)
    model.to(getattr(torch, dtype)).save_pretrained(
        directory, max_shard_size=size + 10_000 if num_shards == 1 else size * 2 // 3
    )
    return load_reference(directory)


def load_reference(directory: Path):
    """The directory as transformers loads it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
