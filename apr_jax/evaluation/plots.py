"""Accuracy against what it costs, with bootstrap intervals on both axes. Needs matplotlib (the extra `plots`)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

AXES = {
    "critical_path": ("critical_path_tokens", "critical path (tokens)"),
    "total_tokens": ("total_tokens", "tokens of all threads"),
    "context": ("max_context_tokens", "longest context attended to (tokens)"),
    "wall_clock": ("engine_s", "engine time a problem (s)"),
}
# Okabe and Ito's colours, readable with any kind of sight; markers tell programs apart in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
MARKERS = "osD^vP*X<>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One program: its results, by increasing budget."""

    label: str
    results: Sequence[dict[str, Any]]


def missing() -> str | None:
    """Why there can be no plots; None if there can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return 'no plots: matplotlib is not installed (pip install -e ".[plots]")'
    return None


def write_plots(directory: Path, series: Sequence[Series], title: str) -> list[Path]:
    """Writes `accuracy_by_AXIS.png` and `.svg` for every axis; returns their paths.

    Raises:
      OSError: a file cannot be written.
    """
    from matplotlib.figure import Figure

    paths = []
    for name, (key, label) in AXES.items():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        _draw(figure, series, key, label, title)
        for ending in ("png", "svg"):
            path = directory / f"accuracy_by_{name}.{ending}"
            partial = path.with_name(f".{path.name}.partial")
            figure.savefig(partial, dpi=200, format=ending, metadata=None if ending == "png" else {"Date": None})
            partial.replace(path)
            paths.append(path)
    return paths


def _draw(figure: Any, series: Sequence[Series], key: str, label: str, title: str) -> None:
    axes = figure.add_subplot()
    for number, each in enumerate(series):
        points = sorted(each.results, key=lambda result: result[key])
        xs, ys = [p[key] for p in points], [100 * p["accuracy"] for p in points]
        axes.errorbar(
            xs,
            ys,
            xerr=_bars(xs, [p[f"{key}_interval"] for p in points]),
            yerr=_bars(ys, [[100 * end for end in p["accuracy_interval"]] for p in points]),
            label=each.label,
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle="-" if len(points) > 1 else "none",
            linewidth=1.2,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=0.9,
            capsize=2.5,
        )
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_xlabel(f"{label}, mean over problems")
    axes.set_ylabel("problems solved (%)")
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(which="major", linewidth=0.5, alpha=0.35)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)


def _plain_ticks(axes: Any) -> None:
    """200, 500, 1000 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:.2g}"))


def _bars(centres: Sequence[float], intervals: Sequence[Sequence[float]]) -> list[list[float]]:
    """Distances down and up, as matplotlib wants them; rounding may put a mean beside its interval."""
    low = [max(0.0, c - i[0]) for c, i in zip(centres, intervals, strict=True)]
    high = [max(0.0, i[1] - c) for c, i in zip(centres, intervals, strict=True)]
    return [low, high]
