"""What all records of one table have in common; records made with other settings are not put beside them."""

import dataclasses
import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from apr_jax.models.checkpoint import checkpoint_directory
from apr_jax.reasoning.api import Engine
from apr_jax.tasks.task import Task
from apr_jax.types import SamplingParams

_MEGABYTE = 1 << 20


def common_settings(
    engine: Engine,
    task: Task,
    checkpoint: str,
    sampling: SamplingParams,
    num_samples: int,
    flags: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything but programs, budgets and the number of problems, to all of which more may be added.

    Args:
      flags: what the programs are made with, beside how they are spelled.
    """
    config = engine.config
    return {
        "task": task.name,
        "problems": task.fingerprint,
        "checkpoint": checkpoint,
        "checkpoint_files": _files_fingerprint(checkpoint_directory(Path(checkpoint).expanduser())),
        "sampling": {k: v for k, v in dataclasses.asdict(sampling).items() if k != "seed"},
        "seed": sampling.seed,
        "num_samples": num_samples,
        **flags,
        "max_threads": config.max_threads,
        "steps_per_dispatch": config.steps_per_dispatch,
        "num_pages": engine.cache.pool.total + 1,
        "page_size": engine.cache.page_size,
        "dtype": config.dtype,
        "kv_dtype": config.kv_dtype,
        "tensor": config.tensor,
        "platform": jax.devices()[0].device_kind,
        "versions": {name: metadata.version(name) for name in ("apr-jax", "jax")},
    }


def _files_fingerprint(directory: Path) -> str:
    """Of names, sizes, and the first and last megabyte of each file: gigabytes of weights are not read again. What is
    written about a model changes nothing.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.suffix != ".md"):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_MEGABYTE))
            file.seek(max(0, size - _MEGABYTE))
            digest.update(file.read())
    return digest.hexdigest()[:12]
