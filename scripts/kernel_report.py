"""What `benchmark_kernels.py` found, as a Markdown table and as plots of bandwidth against readers and prefix."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

BASELINES = {"private": "ours, no sharing", "jax": "JAX's own", "flashinfer": "FlashInfer"}
_COLUMNS = ("case", "us", "unique GB/s", "of copy", "roofline us", "of roofline", "bound by", "error")


def markdown(summary: dict[str, Any]) -> str:
    """A table a kind of case, the absent baselines' reasons below."""
    device, measured = summary["device"], summary["measured"]
    lines = [f"# Kernels on {device['kind']}, backend `{device['backend']}`", "", summary["note"], ""]
    if measured is not None:
        lines += [
            f"Copy {measured['copy_gb_per_s']:,.0f} GB/s, matmul {measured['matmul_tflops']:,.1f} TFLOP/s, measured in "
            "this run; *of roofline* is max(unique bytes / copy, flops / matmul) over the time taken. A baseline's "
            "number is its time over ours: above 1 ours is faster.",
            "",
        ]
    lines += [_row([*_COLUMNS, *BASELINES.values()]), _row(["---", *["---:"] * (len(_COLUMNS) + len(BASELINES) - 1)])]
    cases = [case for case in summary["cases"] if case["kind"] != "step"]
    lines += [_row(_cells(case)) for case in cases]
    for case in summary["cases"]:
        if case["kind"] == "step":
            lines += ["", *_step_lines(case)]
    lines += _reasons(cases)
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str = ",.1f") -> str:
    return "-" if value is None else format(value, form)


def _cells(case: dict[str, Any]) -> list[str]:
    error = _number(case.get("max_error"), ".1e") + (" WRONG" if case.get("correct") is False else "")
    cells = [
        case["name"],
        _number(case["us"]),
        _number(case.get("gb_per_s"), ",.0f"),
        _number(case.get("copy_fraction"), ".0%"),
        _number(case.get("roofline_us")),
        _number(case.get("roofline_fraction"), ".0%"),
        case.get("bound", "-"),
        _why(case) or error,
    ]
    baselines = case.get("baselines", {})
    return cells + [_number(baselines.get(name, {}).get("ratio"), ".2f") for name in BASELINES]


def _why(case: dict[str, Any]) -> str:
    """Why a case has no result, short enough for a table."""
    if case.get("skipped"):
        return f"skipped: {case['skipped']}"
    return case.get("error", "")[:80].replace("|", "/")


def _reasons(cases: list[dict[str, Any]]) -> list[str]:
    reasons: dict[str, set[str]] = {}
    for case in cases:
        for name, baseline in case.get("baselines", {}).items():
            if baseline["us"] is None and baseline.get("reason"):
                reasons.setdefault(f"{BASELINES[name]}: {baseline['reason']}", set()).add(case["name"])
    if not reasons:
        return []
    return ["", "Not measured:", "", *(f"- {reason} ({len(names)} cases)" for reason, names in sorted(reasons.items()))]


def _step_lines(case: dict[str, Any]) -> list[str]:
    if case["us"] is None:
        return [f"`{case['name']}`: {_why(case) or 'not timed'}"]
    parts = ", ".join(f"{name} {us:,.0f}" for name, us in case["parts_us"].items())
    return [
        f"`{case['name']}`, a whole decode step of {case['model']}: {case['us']:,.0f} us, "
        f"{case['roofline_fraction']:.0%} of the bound by bytes ({case['roofline_us']:,.0f} us: "
        f"{case['weight_bytes'] / 1e9:.2f} GB of weights, {case['kv_bytes'] / 1e9:.2f} GB of keys and values).",
        f"Parts, each alone, us a step: {parts}.",
    ]


def plots(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Bandwidth against readers (a line a prefix) and against prefix (a line a number of readers), for decode.

    Returns:
      The files written; none where fewer than two points make no line.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [case for case in summary["cases"] if case["kind"] == "decode" and case.get("gb_per_s") is not None]
    copy = summary["measured"]["copy_gb_per_s"] if summary["measured"] else None
    written = []
    for x, line in (("readers", "prefix"), ("prefix", "readers")):
        series: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for case in cases:
            parameters = case["parameters"]
            point = (parameters[x], case["gb_per_s"])
            series.setdefault((parameters[line], parameters["tail"]), []).append(point)
        series = {key: sorted(points) for key, points in series.items() if len(points) > 1}
        if not series:
            continue
        figure, axes = plt.subplots(figsize=(8, 5))
        for (value, tail), points in sorted(series.items()):
            axes.plot(*zip(*points), marker="o", label=f"{line} {value}, tail {tail}")
        if copy is not None:
            axes.axhline(copy, color="black", linestyle="--", linewidth=1, label="copy")
        axes.set(xscale="log", xlabel=x, ylabel="unique GB/s", title=summary["device"]["kind"])
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
        written.append(folder / f"bandwidth_by_{x}.png")
        figure.savefig(written[-1], dpi=120, bbox_inches="tight")
        plt.close(figure)
    return written
