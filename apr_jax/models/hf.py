"""Hugging Face model directories: config.json, safetensors, tokenizer files. Needs no torch."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from apr_jax.config import ModelConfig, check
from apr_jax.models.atomic import new_directory
from apr_jax.models.decoder import Decoder
from apr_jax.models.hf_config import model_config_from_hf, model_config_to_hf
from apr_jax.models.hf_weights import TensorFiles, check_tensors, read_param, write_tensors
from apr_jax.models.params import build_decoder, check_finite, named_params, param_shapes
from apr_jax.models.sharding import check_divisible
from apr_jax.tokenizers import TOKENIZER_FILES, ByteTokenizer
from apr_jax.tokenizers.json_file import read_json


def load_hf_config(directory: str | Path) -> ModelConfig:
    """The architecture of a Hugging Face directory. Raises ValueError where it is not supported."""
    return model_config_from_hf(*_read_configs(Path(directory)))


def load_hf(directory: str | Path, dtype=None, mesh: Mesh | None = None) -> Decoder:
    """A decoder with the weights of a Hugging Face directory.

    Args:
      directory: with config.json and model.safetensors, or shards and their index.
      dtype: of the decoder; None keeps the dtype that the embedding is stored in.
      mesh: weights go straight to their shards on it, see `sharding`; None: to one device.

    Raises:
      ValueError: a file is missing or damaged, the architecture is not supported, or a tensor is missing,
        unexpected or wrongly shaped; the message names it, what was found and what was expected.
    """
    directory = Path(directory)
    config = load_hf_config(directory)
    if mesh is not None:
        check_divisible(config, mesh.size)
    files = TensorFiles(directory)
    if dtype is None:
        dtype = files.stored.get("model.embed_tokens.weight", ("float32",))[0]
    dtype = jnp.dtype(dtype)
    try:
        check_tensors(files, param_shapes(config, dtype))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return build_decoder(config, dtype, lambda name: read_param(files, name, dtype, mesh))


def export_hf(
    directory: str | Path,
    decoder: Decoder,
    tokenizer_source: str | Path | ByteTokenizer | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a decoder as a Hugging Face directory that transformers loads. It appears whole or not at all.

    Args:
      directory: must not exist, or be empty.
      decoder: written in its own dtype.
      tokenizer_source: the directory that the tokenizer's files are copied from, or a ByteTokenizer.
      max_shard_bytes: above it the weights are written as several files with an index.

    Raises:
      ValueError: the Hugging Face class cannot express the architecture, or values are not finite.
      OSError: the directory holds something, or the disk is full; nothing was written.
    """
    params = named_params(decoder)
    check_finite(params)
    config = model_config_to_hf(decoder.config, str(decoder.dtype))
    with new_directory(directory, sum(array.nbytes for array in params.values())) as partial:
        write_tensors(params, partial, max_shard_bytes)
        copy_tokenizer(tokenizer_source, partial)
        # Last: without it nothing takes the directory for a model.
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: str | Path | ByteTokenizer | None, directory: Path) -> None:
    """Puts a tokenizer's files into a directory: copied from another one, or a ByteTokenizer's own."""
    if isinstance(source, ByteTokenizer):
        source.save(directory)
    elif source is not None:
        for name in TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, directory / name)


def _read_configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json; the latter is {} where there is none."""
    check((directory / "config.json").is_file(), f"{directory} holds no config.json")
    return read_json(directory / "config.json"), read_json(directory / "generation_config.json")
