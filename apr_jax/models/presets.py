"""The shapes of published models: each is the config.json of the Hugging Face repository named, without its weights."""

from apr_jax.config import ModelConfig, RopeConfig


def _llama3(**sizes) -> ModelConfig:
    return ModelConfig(
        vocab_size=128_256,
        num_kv_heads=8,
        head_dim=128,
        max_position=8192,
        rms_eps=1e-5,
        rope=RopeConfig(theta=500_000.0),
        bos_id=128_000,
        eos_ids=(128_001,),
        **sizes,
    )


def _qwen3(**sizes) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        num_kv_heads=8,
        head_dim=128,
        max_position=40_960,
        rms_eps=1e-6,
        qk_norm=True,
        rope=RopeConfig(theta=1_000_000.0),
        bos_id=151_643,
        eos_ids=(151_645,),
        architecture="Qwen3ForCausalLM",
        **sizes,
    )


PRESETS = {
    # meta-llama/Meta-Llama-3-8B, -70B
    "llama3_8b": _llama3(d_model=4096, num_layers=32, num_heads=32, d_ff=14_336),
    "llama3_70b": _llama3(d_model=8192, num_layers=80, num_heads=64, d_ff=28_672),
    # Qwen/Qwen3-0.6B, -4B, -8B, -32B
    "qwen3_0_6b": _qwen3(d_model=1024, num_layers=28, num_heads=16, d_ff=3072, tie_embeddings=True),
    "qwen3_4b": _qwen3(d_model=2560, num_layers=36, num_heads=32, d_ff=9728, tie_embeddings=True),
    "qwen3_8b": _qwen3(d_model=4096, num_layers=36, num_heads=32, d_ff=12_288),
    "qwen3_32b": _qwen3(d_model=5120, num_layers=64, num_heads=64, d_ff=25_600),
}
