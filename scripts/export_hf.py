"""Exports a checkpoint to a Hugging Face directory that transformers loads: the inverse of convert_hf.py.

The output appears whole or not at all.

Examples:
  python scripts/export_hf.py --source=checkpoints/qwen3_8b --output=qwen3_8b_hf
  python scripts/export_hf.py --source=countdown --output=countdown_bf16 --dtype=bfloat16
"""

from pathlib import Path

import cli
from absl import flags

from apr_jax.models.atomic import check_new_directory
from apr_jax.models.checkpoint import checkpoint_directory, load_decoder
from apr_jax.models.hf import export_hf

_SOURCE = flags.DEFINE_string("source", None, "A checkpoint directory, or countdown, the embedded one.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "A new or empty directory.", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float16", "float32"], "Of the weights written; by default as stored."
)


def main() -> None:
    output = Path(_OUTPUT.value).expanduser()
    check_new_directory(output)
    source = checkpoint_directory(Path(_SOURCE.value).expanduser())
    with cli.profile():
        decoder = load_decoder(source, _DTYPE.value)
        export_hf(output, decoder, source)
    print(f"{output}: {decoder.config.architecture}, {decoder.num_params:,} parameters, {decoder.dtype}")


if __name__ == "__main__":
    cli.run(main)
