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
    others = {entry.name for entry in directory.iterdir()} - ours if directory.exists() else set()
    if others:
        raise ValueError(f"{directory} holds {sorted(others)}, which an export would remove")
    fresh = directory.with_name(f".{directory.name}.new")  # the earlier export goes when this one is whole
    shutil.rmtree(fresh, ignore_errors=True)
    with tempfile.TemporaryDirectory() as source:
        (pathlib.Path(source) / "tokenizer.model").write_bytes(build_sentencepiece_model())
        export_hf(fresh, decoder, source)
    if directory.exists():
        if (directory / "README.md").exists():
            shutil.copyfile(directory / "README.md", fresh / "README.md")
        shutil.rmtree(directory)
    fresh.rename(directory)
