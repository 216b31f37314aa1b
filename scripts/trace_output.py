"""`--trace`: what happened in the engine, written whatever becomes of the run."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from absl import flags
from json_output import check_output_path, write_text

from apr_jax import Engine
from apr_jax.config import check
from apr_jax.reasoning.output import Output
from apr_jax.tracing import Recorder, as_chrome_trace, as_html

SUFFIXES = (".html", ".json")

_TRACE = flags.DEFINE_string(
    "trace", None, "Write what happened into this file: a page (.html), or a trace for ui.perfetto.dev (.json)."
)


def check_trace_path() -> Path | None:
    """The path of --trace, if there is one and a file can be written there.

    Raises:
      ValueError: the suffix names no kind of trace.
      OSError: no file can be written there.
    """
    if _TRACE.value is None:
        return None
    check(Path(_TRACE.value).suffix in SUFFIXES, f"--trace={_TRACE.value} ends in none of {', '.join(SUFFIXES)}")
    return check_output_path(_TRACE.value)


class TraceFile:
    """Records an engine and writes the file.

    Attributes:
      metrics: of requests that have been measured, by family id.
    """

    def __init__(self, recorder: Recorder, path: Path, title: str):
        self._recorder, self._path, self._title = recorder, path, title
        self.metrics: dict[int, dict[str, float]] = {}

    def measured(self, family_ids: Iterable[int], outputs: Iterable[Output]) -> None:
        for family_id, output in zip(family_ids, outputs, strict=True):
            self.metrics[family_id] = dataclasses.asdict(output.metrics)

    def write(self) -> None:
        trace = self._recorder.trace(self._title, self.metrics)
        if str(_TRACE.value).endswith(".html"):
            write_text(self._path, as_html(trace))
        else:
            write_text(self._path, json.dumps(as_chrome_trace(trace), allow_nan=False) + "\n")


@contextlib.contextmanager
def traced(engine: Engine, path: Path | None, title: str) -> Iterator[TraceFile | None]:
    """Traces what runs inside into a file, which is written also if that raises or is interrupted; without a path it
    does nothing.
    """
    if path is None:
        yield None
        return
    with Recorder(engine) as recorder:
        file = TraceFile(recorder, path, title)
        try:
            yield file
        finally:
            file.write()
