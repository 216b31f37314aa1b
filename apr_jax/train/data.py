"""Training data in chunks: made ahead of time by worker processes, the same for any worker.

A chunk is a fixed range of sample indices, packed into steps. Its file appears whole or not at all: any
number of workers may write, and a killed run goes on with what is there.
"""

import hashlib
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

from apr_jax.config import check
from apr_jax.train.packing import FIELDS, Row, batches, pack

Step = dict[int, dict[str, np.ndarray]]


class ChunkStore:
    """Chunks of packed training steps in a directory.

    Args:
      directory: where the files go; a subfolder is named after everything they depend on.
      samples: index -> rows, none to leave the sample out. Its repr must say all it depends on.
      chunk_size: samples a chunk.
      rows_per_step: row length -> rows, ascending lengths.
      pad_id: token id of the padding.
      version: names what else the rows depend on, such as the code that makes them.

    Raises:
      ValueError: a length or a number is out of its range.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        samples: Callable[[int], list[Row]],
        *,
        chunk_size: int,
        rows_per_step: Mapping[int, int],
        pad_id: int,
        version: str = "",
    ):
        check(chunk_size >= 1, f"chunk_size is {chunk_size}, must be >= 1")
        lengths, rows = list(rows_per_step), list(rows_per_step.values())
        check(bool(lengths) and lengths == sorted(lengths), f"lengths are {lengths}, must ascend")
        check(min(lengths) >= 1 and min(rows) >= 1, f"lengths are {lengths}, rows {rows}: all must be >= 1")
        self.samples, self.chunk_size = samples, chunk_size
        self.rows_per_step, self.pad_id = dict(rows_per_step), pad_id
        recipe = repr((samples, chunk_size, sorted(self.rows_per_step.items()), pad_id, version))
        self.directory = pathlib.Path(directory) / hashlib.sha256(recipe.encode()).hexdigest()[:12]

    def path(self, chunk: int) -> pathlib.Path:
        return self.directory / f"chunk_{chunk:06d}.npz"

    def make(self, chunk: int) -> None:
        """Writes a chunk's file, unless it is there."""
        path = self.path(chunk)
        if path.exists():
            return
        first = chunk * self.chunk_size
        rows = [row for i in range(first, first + self.chunk_size) for row in self.samples(i)]
        check(bool(rows), f"samples {first:,} to {first + self.chunk_size - 1:,} are all left out: none is in a chunk")
        packed = pack(rows, list(self.rows_per_step), self.pad_id)
        rng = np.random.default_rng((chunk, 2))
        for length in packed:
            packed[length] = [packed[length][i] for i in rng.permutation(len(packed[length]))]
        steps = batches(packed, self.rows_per_step, self.pad_id)
        arrays = {
            f"{length}/{field}": np.stack([step[length][field] for step in steps]).astype(np.uint16)
            for length in self.rows_per_step
            for field in FIELDS
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with open(partial, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(partial, path)

    def load(self, chunk: int) -> list[Step]:
        """The steps of a chunk, made now if no worker has. A step has the lengths that it has rows of."""
        self.make(chunk)
        with np.load(self.path(chunk)) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
        num_steps = len(next(iter(loaded.values())))
        return [
            {
                length: {
                    field: loaded[f"{length}/{field}"][i].astype(np.float32 if field == "loss" else np.int32)
                    for field in FIELDS
                }
                for length in self.rows_per_step
                if (loaded[f"{length}/tokens"][i] != self.pad_id).any()
            }
            for i in range(num_steps)
        ]


def _work(store: ChunkStore, first: int, stride: int, cursor, ahead: int, parent: int) -> None:
    os.nice(5)
    chunk = first
    while os.getppid() == parent:
        if chunk > cursor.value + ahead:
            time.sleep(1.0)
            continue
        store.make(chunk)
        chunk += stride


class ChunkReader:
    """Reads chunks in order while worker processes make the next ones. Leaving the context ends them.

    Args:
      first: the chunk to begin with.
      num_workers: 0 makes every chunk when it is asked for.
      ahead: chunks that workers may be in front.
    """

    def __init__(self, store: ChunkStore, *, first: int = 0, num_workers: int = 1, ahead: int = 8):
        self.store, self._first = store, first
        context = multiprocessing.get_context("spawn")
        self._told: dict[int | None, int | None] = {}  # workers that have ended and were told of
        self._cursor = context.Value("q", first)
        self._workers = [
            context.Process(
                target=_work,
                args=(store, first + i, num_workers, self._cursor, ahead, os.getpid()),
                daemon=True,
            )
            for i in range(num_workers)
        ]
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> "ChunkReader":
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()

    def load(self, chunk: int) -> list[Step]:
        """The steps of a chunk; waits for the worker whose turn it is while that one lives."""
        self._cursor.value = max(self._cursor.value, chunk)
        if self._workers:
            worker = self._workers[(chunk - self._first) % len(self._workers)]
            while not self.store.path(chunk).exists() and worker.is_alive():
                time.sleep(0.1)
            if not worker.is_alive() and worker.exitcode != self._told.get(worker.pid):
                self._told[worker.pid] = worker.exitcode
                logging.warning("a data worker has ended, exit code %s: its chunks are made here", worker.exitcode)
        return self.store.load(chunk)
