"""Writes the sentencepiece model of the Countdown format.

python scripts/build_countdown_tokenizer.py --output=apr_jax/assets/countdown/tokenizer.model
"""

import os
import pathlib

import cli
from absl import flags

from apr_jax.tasks.countdown_tokenizer import build_sentencepiece_model

_OUTPUT = flags.DEFINE_string("output", None, "The file to write.", required=True)


def main() -> None:
    output = pathlib.Path(_OUTPUT.value)
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_bytes(build_sentencepiece_model())
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    cli.run(main)
