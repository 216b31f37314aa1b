"""Hugging Face's safetensors files to and from named parameters. torch keeps a linear weight as [out, in]."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from apr_jax.config import check
from apr_jax.models.sharding import param_sharding
from apr_jax.tokenizers.json_file import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

_LAYER_PARTS = {
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
}
_LINEARS = {f"attention.{name}": f"self_attn.{name}_proj" for name in "qkvo"}
_LINEARS |= {f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
for _ours, _theirs in _LINEARS.items():
    _LAYER_PARTS |= {f"{_ours}.kernel": f"{_theirs}.weight", f"{_ours}.bias": f"{_theirs}.bias"}
_TOP = {
    "embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of a parameter."""
    if name in _TOP:
        return _TOP[name]
    _, layer, part = name.split(".", 2)
    return f"model.layers.{layer}.{_LAYER_PARTS[part]}"


def is_transposed(name: str) -> bool:
    """Whether Hugging Face keeps the parameter the other way round."""
    return name == "lm_head" or name.endswith(".kernel")


class TensorFiles:
    """The tensors of a directory, in one file or in several with an index.

    Attributes:
      stored: name -> (dtype name, shape) as the files' headers state them.

    Raises:
      ValueError: no such files, a shard is missing, a file is truncated or holds other dtypes.
    """

    def __init__(self, directory: Path):
        self.stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._files: dict[str, Any] = {}
        for path in _shards(directory):
            try:
                file = safetensors.safe_open(path, framework="numpy")  # pyright: ignore[reportCallIssue]
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                header = file.get_slice(name)
                check(
                    header.get_dtype() in DTYPES,
                    f"{path}: tensor {name} is {header.get_dtype()}, expected one of {', '.join(DTYPES)}",
                )
                self.stored[name] = (DTYPES[header.get_dtype()], tuple(header.get_shape()))
                self._files[name] = file

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its stored dtype."""
        return self._files[name].get_tensor(name)


def _shards(directory: Path) -> list[Path]:
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    index = directory / INDEX_FILE
    check(index.is_file(), f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json(index).get("weight_map") or {}
    sound = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    check(sound and bool(weight_map), f"{index} holds no weight_map from tensors to files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        check((directory / shard).is_file(), f"{index} names {shard}, which is missing")
    return [directory / shard for shard in shards]


def check_tensors(files: TensorFiles, shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Refuses tensors that are missing, unexpected or wrongly shaped.

    Args:
      files: what was found.
      shapes: what is expected, by our names.

    Raises:
      ValueError: names the first tensor that differs, what was found and expected, and how many more.
    """
    expected = {hf_name(name): s.shape[::-1] if is_transposed(name) else s.shape for name, s in shapes.items()}
    problems = []
    for name, shape in expected.items():
        if name not in files.stored:
            problems.append(f"tensor {name} is missing, expected shape {list(shape)}")
        elif files.stored[name][1] != shape:
            problems.append(f"tensor {name} has shape {list(files.stored[name][1])}, expected {list(shape)}")
    for name in files.stored.keys() - expected.keys():
        if name == "lm_head.weight":
            tied = _TOP["embedding"]
            if tied in files.stored and not np.array_equal(files.read(name), files.read(tied)):
                problems.append(f"tensor {name} differs from the embedding, expected none: they are tied")
        elif not name.endswith(".rotary_emb.inv_freq"):
            problems.append(f"tensor {name} of shape {list(files.stored[name][1])} is unexpected")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    check(not problems, f"{problems[0] if problems else ''}{more}")


def read_param(files: TensorFiles, name: str, dtype, mesh: Mesh | None = None) -> jax.Array:
    """One parameter in our layout; on a mesh each device gets its shard only."""
    if mesh is None:
        array = jnp.asarray(files.read(hf_name(name)))
        return (array.T if is_transposed(name) else array).astype(dtype)
    host = files.read(hf_name(name))
    host = (host.T if is_transposed(name) else host).astype(dtype)
    return jax.device_put(host, param_sharding(mesh, name, host.shape))


def write_tensors(params: dict[str, jax.Array], directory: Path, max_shard_bytes: int) -> None:
    """Writes params in Hugging Face's names and layout in one file, or over the limit in shards."""
    shards = list(_split(params, max_shard_bytes))
    weight_map = {}
    for i, names in enumerate(shards):
        file_name = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {hf_name(name): _to_hf(name, params[name]) for name in names}
        weight_map |= dict.fromkeys(tensors, file_name)
        try:
            safetensors.numpy.save_file(tensors, directory / file_name, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # what the operating system said, as text
            raise OSError(f"{directory / file_name} cannot be written: {error}") from error
        (directory / file_name).chmod(0o644)  # the library leaves it to its owner alone
    if len(shards) > 1:
        total = {"total_size": sum(array.nbytes for array in params.values())}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _to_hf(name: str, array: jax.Array) -> np.ndarray:
    host = np.asarray(array)
    return np.ascontiguousarray(host.T if is_transposed(name) else host)


def _split(params: dict[str, jax.Array], max_shard_bytes: int) -> Iterator[Iterable[str]]:
    names: list[str] = []
    size = 0
    for name, array in params.items():
        if names and size + array.nbytes > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += array.nbytes
    yield names
