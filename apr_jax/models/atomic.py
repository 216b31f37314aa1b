"""Directories that appear whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


@contextlib.contextmanager
def new_directory(directory: str | Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Gives a hidden sibling to write into, and renames it to `directory` when the block ends.

    If the block raises, the sibling is removed and nothing appears; after a kill it is left behind as
    `.NAME.partial`, and the next attempt replaces it.

    Args:
      directory: must not exist, or be empty.
      needed_bytes: how much the arrays take that will be written.

    Raises:
      FileExistsError: the directory holds something.
      OSError: the disk is full; the message names what was needed and what was free.
    """
    directory = Path(os.path.abspath(directory))
    check_new_directory(directory)
    partial = directory.parent / f".{directory.name}{PARTIAL_SUFFIX}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    needed_bytes += needed_bytes // 50 + (1 << 20)  # headers, indices, tokenizer files
    free = shutil.disk_usage(directory.parent).free
    if free < needed_bytes:
        raise _disk_full(directory, needed_bytes, free)
    partial.mkdir()
    try:
        yield partial
        _sync_tree(partial)
        os.rename(partial, directory)
    except BaseException as error:
        free = shutil.disk_usage(directory.parent).free
        shutil.rmtree(partial, ignore_errors=True)
        if "no space left on device" in f"{error}".lower():  # each library has its own exception for it
            raise _disk_full(directory, needed_bytes, free) from error
        raise
    _sync(directory.parent)


def check_new_directory(directory: str | Path) -> None:
    """Raises FileExistsError if something lies there: a file, or a directory that is not empty."""
    directory = Path(directory)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty: name a new directory")


def _disk_full(directory: Path, needed_bytes: int, free: int) -> OSError:
    message = f"the disk is full: {directory} needs {needed_bytes:,} bytes, {free:,} are free; nothing was written"
    return OSError(errno.ENOSPC, message)


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
