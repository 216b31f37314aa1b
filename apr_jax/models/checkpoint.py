"""Checkpoints: directories with parameters (orbax), the model's settings, and the tokenizer's files.

NAME/params/            orbax, one array a parameter, by name
NAME/model_config.json  every field of ModelConfig, and the dtype
NAME/tokenizer.json ... as in the directory it was converted from
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from apr_jax.config import ModelConfig, RopeConfig, check
from apr_jax.models.atomic import PARTIAL_SUFFIX, new_directory
from apr_jax.models.decoder import Decoder
from apr_jax.models.hf import copy_tokenizer, load_hf
from apr_jax.models.params import build_decoder, check_finite, named_params, param_shapes
from apr_jax.models.sharding import check_divisible, make_mesh, param_sharding
from apr_jax.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

CONFIG_FILE = "model_config.json"
PARAMS_DIR = "params"
_FORMAT = "apr_jax/1"
_ASSETS = Path(__file__).parents[1] / "assets"


def save_checkpoint(
    directory: str | Path, decoder: Decoder, tokenizer_source: str | Path | ByteTokenizer | None = None
) -> None:
    """Writes a checkpoint. It appears whole or not at all.

    Args:
      directory: must not exist, or be empty.
      decoder: written in its own dtype.
      tokenizer_source: the directory that the tokenizer's files are copied from, or a ByteTokenizer.

    Raises:
      ValueError: a parameter has values that are not finite. Nothing was written.
      OSError: the directory holds something, or the disk is full; nothing was written.
    """
    import orbax.checkpoint as ocp  # half a second that the embedded model does not need

    params = named_params(decoder)
    check_finite(params)
    content = {
        "format": _FORMAT,
        "dtype": str(decoder.dtype),
        "config": dataclasses.asdict(decoder.config),
    }
    with new_directory(directory, sum(array.nbytes for array in params.values())) as partial:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / PARAMS_DIR, params)
        copy_tokenizer(tokenizer_source, partial)
        # Last: without it nothing takes the directory for a checkpoint.
        (partial / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(path: str | Path, dtype=None, tensor: int = 1) -> tuple[ModelConfig, Decoder, Tokenizer]:
    """Model and tokenizer of an embedded model, a checkpoint directory or a Hugging Face directory.

    Args:
      path: an embedded model's name ("countdown") or a directory.
      dtype: of the decoder; None keeps the stored one.
      tensor: how many devices the weights are split over, see `sharding`.

    Raises:
      ValueError: it is none of these, or damaged, or the tokenizer does not fit the model, or it cannot be split.
    """
    directory = checkpoint_directory(path)
    decoder = load_decoder(directory, dtype, make_mesh(tensor))
    tokenizer = load_tokenizer(directory)
    check(
        tokenizer.vocab_size <= decoder.config.vocab_size,
        f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model {decoder.config.vocab_size}",
    )
    return decoder.config, decoder, tokenizer


def load_decoder(path: str | Path, dtype=None, mesh: Mesh | None = None) -> Decoder:
    """The model of `load_checkpoint`, without its tokenizer."""
    directory = checkpoint_directory(path)
    if (directory / CONFIG_FILE).is_file():
        return _load_own(directory, dtype, mesh)
    return load_hf(directory, dtype, mesh)


def checkpoint_directory(path: str | Path) -> Path:
    """Where an embedded model or a checkpoint lies.

    Raises:
      ValueError: there is no such model or directory, or it is no checkpoint.
    """
    embedded = embedded_names()
    if str(path) in embedded:
        return _ASSETS / str(path)
    directory = Path(path)
    known = f"expected a directory or an embedded model ({', '.join(embedded) or 'none installed'})"
    check(directory.is_dir(), f"no checkpoint {str(path)!r}: {known}")
    check(directory.suffix != PARTIAL_SUFFIX, f"{directory} is no checkpoint: writing it was interrupted")
    check(
        (directory / CONFIG_FILE).is_file() or (directory / "config.json").is_file(),
        f"{directory} is no checkpoint: it holds neither {CONFIG_FILE} nor config.json",
    )
    return directory


def embedded_names() -> list[str]:
    """The models that ship with the package."""
    return sorted(path.parent.name for path in _ASSETS.glob("*/config.json"))


def _load_own(directory: Path, dtype, mesh: Mesh | None) -> Decoder:
    import orbax.checkpoint as ocp

    config, stored_dtype = _read_config(directory / CONFIG_FILE)
    dtype = jnp.dtype(stored_dtype if dtype is None else dtype)
    if mesh is not None:
        check_divisible(config, mesh.size)
    expected = param_shapes(config, dtype)
    path = (directory / PARAMS_DIR).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            found = checkpointer.metadata(path).item_metadata.tree
        except Exception as error:  # orbax raises what its storage raises
            raise ValueError(f"{path} is no orbax checkpoint: {' '.join(str(error).split())}") from error
        _check_params(path, {name: tuple(array.shape) for name, array in found.items()}, expected)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {
            name: jax.ShapeDtypeStruct(
                s.shape, s.dtype, sharding=one if mesh is None else param_sharding(mesh, name, s.shape)
            )
            for name, s in expected.items()
        }
        try:
            params = checkpointer.restore(path, target)
        except Exception as error:
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    return build_decoder(config, dtype, params.__getitem__)


def _check_params(path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, Any]) -> None:
    for name, array in expected.items():
        check(name in found, f"{path}: parameter {name} is missing, expected shape {list(array.shape)}")
        check(
            found[name] == array.shape,
            f"{path}: parameter {name} has shape {list(found[name])}, expected {list(array.shape)}",
        )
    for name in found.keys() - expected.keys():
        raise ValueError(f"{path}: parameter {name} of shape {list(found[name])} is unexpected")


def _read_config(path: Path) -> tuple[ModelConfig, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check(content["format"] == _FORMAT, f"its format is {content['format']!r}, expected {_FORMAT!r}")
        fields = dict(content["config"])
        fields["rope"] = RopeConfig(**fields["rope"])
        fields["eos_ids"] = tuple(fields["eos_ids"])
        return ModelConfig(**fields), content["dtype"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error
