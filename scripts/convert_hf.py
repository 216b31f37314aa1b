"""Converts a Hugging Face model directory to an orbax checkpoint, its settings and tokenizer beside it.

Llama 2 / 3.x, Qwen2 / 2.5, Qwen3 and Mistral without a sliding window; safetensors in bf16, f16 or f32. The
output appears whole or not at all.

Examples:
  python scripts/convert_hf.py --source=~/models/Qwen3-8B --output=checkpoints/qwen3_8b
  python scripts/convert_hf.py --source=~/models/llama --output=checkpoints/llama_f32 --dtype=float32
"""

import sys
from pathlib import Path

import cli
from absl import flags

from apr_jax.models.atomic import check_new_directory
from apr_jax.models.checkpoint import save_checkpoint
from apr_jax.models.hf import load_hf
from apr_jax.tokenizers import has_tokenizer, load_tokenizer

_SOURCE = flags.DEFINE_string("source", None, "The Hugging Face directory.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The checkpoint: a new or empty directory.", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float16", "float32"], "Of the parameters written; by default as stored."
)


def main() -> None:
    source, output = Path(_SOURCE.value).expanduser(), Path(_OUTPUT.value).expanduser()
    if not source.is_dir():
        raise ValueError(f"--source={source} is no directory")
    check_new_directory(output)
    has_text = has_tokenizer(source)
    if has_text:
        load_tokenizer(source)  # refuses a damaged one before anything is written
    with cli.profile():
        decoder = load_hf(source, _DTYPE.value)
        save_checkpoint(output, decoder, source)
    if not has_text:
        print(f"note: no tokenizer in {source}, so the checkpoint has none", file=sys.stderr)
    print(f"{output}: {decoder.config.architecture}, {decoder.num_params:,} parameters, {decoder.dtype}")


if __name__ == "__main__":
    cli.run(main)
