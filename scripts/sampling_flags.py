"""The flags that say how a model samples, shared by the scripts that generate."""

from absl import flags

from apr_jax import SamplingParams

# The embedded model's context window: its longest right answers are 1,280 tokens long, and none is cut.
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 2048, "Bounds the critical path, as the context window does.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "1 keeps all tokens.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "0 keeps all tokens.")


def sampling_params(seed: int) -> SamplingParams:
    """What the flags say.

    Raises:
      ValueError: a value is out of its range.
    """
    if _MAX_NEW_TOKENS.value < 1:
        raise ValueError(f"--max_new_tokens={_MAX_NEW_TOKENS.value}, must be >= 1")
    return SamplingParams(
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        seed=seed,
    )
