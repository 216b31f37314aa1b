"""What evaluate.py shows and writes: progress, the table, results.json, table.md, plots."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from json_output import write_json, write_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from apr_jax.evaluation import plots
from apr_jax.evaluation.statistics import Interval
from apr_jax.evaluation.summary import ROWS, markdown


def check_output_dir(path: str) -> Path:
    """The directory, made if it is not there: asked for before any work is done for it.

    Raises:
      OSError: something else lies there, or it cannot be made or written to.
    """
    directory = Path(path).expanduser().resolve()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"cannot write into {directory}: it is there, and no directory")
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"cannot write into {directory}: it is not writable")
    return directory


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def console_table(summaries: dict[str, dict[str, Any]]) -> None:
    table = Table(title="means over problems; ± standard error")
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right")
    for label, show in ROWS:
        table.add_row(label, *(show(result) for result in summaries.values()))
    Console().print(table)


def write_output(
    directory: Path,
    content: dict[str, Any],
    summaries: dict[str, dict[str, Any]],
    differences: dict[str, Interval],
    series: Sequence[plots.Series],
    title: str,
) -> None:
    """Writes results.json, table.md and, with matplotlib, the plots."""
    write_json(directory / "results.json", content)
    write_text(directory / "table.md", markdown(summaries, differences, title))
    if plots.missing() is None:
        plots.write_plots(directory, series, title)
    print(f"written to {directory}: {', '.join(sorted(p.name for p in directory.iterdir() if p.name[0] != '.'))}")
