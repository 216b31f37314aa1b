"""A trained Countdown decoder as a Hugging Face directory with the format's tokenizer."""

import pathlib
import shutil
import tempfile

from apr_jax.models.decoder import Decoder
from apr_jax.models.hf import export_hf
from apr_jax.tasks.countdown_tokenizer import build_sentencepiece_model


def export_countdown(directory: pathlib.Path, decoder: Decoder) -> None:
    """Writes config.json, model.safetensors and tokenizer.model; replaces an earlier export, keeps its README.md.

    Raises:
      ValueError: the directory holds something else.
    """
    ours = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "README.md"}
    card = None
    if directory.exists():
        others = {entry.name for entry in directory.iterdir()} - ours
        if others:
            raise ValueError(f"{directory} holds {sorted(others)}, which an export would remove")
        card = (directory / "README.md").read_bytes() if (directory / "README.md").exists() else None
        shutil.rmtree(directory)
    with tempfile.TemporaryDirectory() as source:
        (pathlib.Path(source) / "tokenizer.model").write_bytes(build_sentencepiece_model())
        export_hf(directory, decoder, source)
    if card is not None:
        (directory / "README.md").write_bytes(card)
