"""How scripts load a model: compiled programs are kept on disk between runs."""

import os
from pathlib import Path

from absl import logging

from apr_jax import Engine
from apr_jax.config import EngineConfig


def load_engine(checkpoint: str, **engine_fields) -> Engine:
    """The engine for a preset or a directory.

    Args:
      engine_fields: of EngineConfig.

    Raises:
      ValueError: there is no such checkpoint, or it is damaged.
    """
    config = EngineConfig(compile_cache_dir=_compile_cache_dir(), **engine_fields)
    return Engine.from_checkpoint(os.path.expanduser(checkpoint), engine_config=config)


def _compile_cache_dir() -> str | None:
    """`apr_jax` in the user's cache directory; None, with a warning, if it cannot be written."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apr_jax"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("compiled programs are not kept: %s", error)
        return None
    return str(directory)
