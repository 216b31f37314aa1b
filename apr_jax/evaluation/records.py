"""What an evaluation has finished, on disk: one line of JSON a problem, so that a killed run goes on where it was.

{"settings": {...}}      the first line: what all records have in common
{"program": ..., ...}    one `Record` a line, appended when its request has ended
"""

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apr_jax.evaluation.budgets import TokenBudget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One problem under one program and budget.

    Attributes:
      program: as it was spelled. problem: its index.
      seed: of its sampling.
      settings: fingerprint of what all records have in common.
      reason: why it is not correct; None if it is.
      metrics: the fields of `Metrics`, and `engine_s`: the engine's time that the request was charged, so that the
        sum over all records is the wall clock of the whole evaluation however often it was interrupted.
      needed: by kind, the smallest budget that is known to change nothing (`reasoning.budget.Budget.needed`).
      reused_from: the budget whose run answers this one too, as it is the same token for token (`unlimited` if it had
        none); None: it was run.
      grammar_fingerprint: of the file that says what the program is; None: it is built in.
    """

    program: str
    budget: TokenBudget | None
    problem: int
    seed: int
    settings: str
    correct: bool
    answer: str | None
    reason: str | None
    finish_reason: str
    well_formed: bool
    degraded: list[str]
    metrics: dict[str, float]
    needed: dict[str, int]
    reused_from: str | None = None
    grammar_fingerprint: str | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.program, str(self.budget), self.problem

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The settings and the records of an evaluation's file. A last line without its end was cut off: it is left out.

    Raises:
      ValueError: the first line holds no settings, or a later one is no record.
    """
    *whole, _ = path.read_bytes().split(b"\n")
    first, *lines = whole or [b""]
    try:
        settings = dict(json.loads(first)["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}, line 1 holds no settings: it is not an evaluation's file") from error
    records = []
    for number, line in enumerate(lines, 2):
        try:
            fields = json.loads(line)
            budget = fields.pop("budget")
            records.append(Record(budget=None if budget is None else TokenBudget(**budget), **fields))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no record: {error}") from error
    return settings, records


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short name for settings; other ones have another."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class RecordStore:
    """The records of one evaluation, in memory and, with a path, on disk. Use as a context manager.

    Args:
      settings: what must be the same for records to stand in one table; plain JSON values.
      path: a file, made if it is not there; None keeps records in memory only.

    Raises:
      ValueError: the file holds records of other settings, or a line that is no record.
      OSError: it cannot be written, or another process writes to it.
    """

    def __init__(self, settings: Mapping[str, Any], path: Path | None = None):
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.fingerprint = fingerprint(self.settings)
        self._records: dict[tuple[str, str, int], Record] = {}
        self._path, self._file = path, None
        if path is None:
            return
        self._file = path.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "RecordStore":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, program: str, budget: TokenBudget | None, problem: int) -> Record | None:
        return self._records.get((program, str(budget), problem))

    def grammar_fingerprints(self, program: str) -> set[str | None]:
        """Of all records of a program."""
        return {record.grammar_fingerprint for record in self._records.values() if record.program == program}

    def add(self, record: Record) -> None:
        """Takes a record in; whatever happens to this process then, it is in the file."""
        self._records[record.key] = record
        self._write(record.to_json())

    def _write(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def _lock(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another process writes to {self._path}") from error

    def _read(self) -> None:
        """Reads what is there. A last line without its end was cut off by a kill: it is taken away."""
        assert self._file is not None and self._path is not None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        first = json.dumps({"settings": self.settings})
        if not whole and first.encode().startswith(content):
            self._file.truncate(0)
            self._write(first)
            return
        settings, records = read_records(self._path)
        self._compare_settings(settings)
        self._file.truncate(whole)  # only now that the file is known for ours
        self._records = {record.key: record for record in records}

    def _compare_settings(self, earlier: Mapping[str, Any]) -> None:
        for name in dict.fromkeys([*earlier, *self.settings]):
            before, now = earlier.get(name), self.settings.get(name)
            if before != now:
                raise ValueError(
                    f"{self._path} holds results with {name} = {before!r}, asked for is {now!r}: write them elsewhere"
                )
