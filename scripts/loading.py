"""How scripts load a model, and the flags that say how: compiled programs are kept on disk between runs."""

import os
from pathlib import Path
from typing import cast, get_args

import jax
from absl import flags, logging
from jax.extend.backend import clear_backends

from apr_jax import Engine
from apr_jax.config import AttentionChoice, CacheConfig, EngineConfig, KVDtype, check
from apr_jax.models.checkpoint import checkpoint_directory

CHECKPOINT_HELP = "countdown (the embedded model), a checkpoint directory, or a Hugging Face directory."
_SMALL_BYTES = 64 * 2**20

_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that heads, MLP and KV pages are split over.")
_ATTENTION = flags.DEFINE_enum(
    "attention",
    "auto",
    list(get_args(AttentionChoice)),
    "auto: Pallas kernels where they run.",
)
_KV_DTYPE = flags.DEFINE_enum(
    "kv_dtype", None, ["float32", "bfloat16", "int8", "float8_e4m3fn"], "Of the KV pages; by default the model's."
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", CacheConfig.page_size, "Token positions a KV page.")
_NUM_PAGES = flags.DEFINE_integer("num_pages", CacheConfig.num_pages, "KV pages in all.")
_CPU_THREADS = flags.DEFINE_integer(
    "cpu_threads",
    None,
    "Threads that XLA computes with where the CPU is the device; by default 1 for a checkpoint under "
    f"{_SMALL_BYTES >> 20} MiB, as handing its small operations from thread to thread costs more than it saves, "
    "else one a core.",
)


def load_engine(checkpoint: str, **engine_fields) -> Engine:
    """The engine for the embedded model or a directory.

    Args:
      engine_fields: of EngineConfig.

    Raises:
      ValueError: there is no such checkpoint, it is damaged, or it does not go with the flags.
    """
    checkpoint = os.path.expanduser(checkpoint)
    _set_cpu_threads(checkpoint)
    engine_config = EngineConfig(
        compile_cache_dir=_compile_cache_dir(),
        tensor=_TENSOR.value,
        attention=cast(AttentionChoice, _ATTENTION.value),
        kv_dtype=cast(KVDtype | None, _KV_DTYPE.value),
        **engine_fields,
    )
    cache_config = CacheConfig(page_size=_PAGE_SIZE.value, num_pages=_NUM_PAGES.value)
    return Engine.from_checkpoint(checkpoint, engine_config=engine_config, cache_config=cache_config)


def _set_cpu_threads(checkpoint: str) -> None:
    """Makes JAX's CPU client anew with as many threads as the flag says; arrays made before are lost."""
    count = _CPU_THREADS.value
    check(count is None or count >= 1, f"--cpu_threads={count}, must be >= 1")
    if jax.default_backend() != "cpu":
        return
    if count is None:
        files = [path for path in checkpoint_directory(checkpoint).rglob("*") if path.is_file()]
        if sum(path.stat().st_size for path in files) >= _SMALL_BYTES:
            return
        count = 1
    before = os.environ.get("NPROC")
    os.environ["NPROC"] = str(count)  # XLA's clients read it when they are made
    try:
        clear_backends()
        jax.devices()
    finally:
        del os.environ["NPROC"]
        if before is not None:
            os.environ["NPROC"] = before


def _compile_cache_dir() -> str | None:
    """`apr_jax` in the user's cache directory; None, with a warning, if it cannot be written."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apr_jax"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("compiled programs are not kept: %s", error)
        return None
    return str(directory)
