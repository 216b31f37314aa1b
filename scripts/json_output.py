"""Results in files that appear whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def check_output_path(path: str) -> Path:
    """The path, if a file can be written there: asked before any work is done for it.

    Raises:
      OSError: something else than a file lies there, or the directory that it lies in is missing or not
        writable.
    """
    target = Path(path).expanduser().resolve()
    if target.exists() and not target.is_file():
        raise FileExistsError(f"cannot write {target}: it is there, and no file")
    folder = target.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no directory {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write {target}: {folder} is not writable")
    return target


def write_json(path: Path, content: Any) -> None:
    """Writes as `write_text` does."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes beside the path and renames.

    Raises:
      OSError: the disk is full, or the like; an earlier file is as it was, and nothing half-written is left.
    """
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.absolute().parent, prefix=f".{path.name}.", delete=False
        ) as file:
            partial = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise OSError(f"cannot write the {len(text):,} bytes of {path}: {error.strerror}") from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
