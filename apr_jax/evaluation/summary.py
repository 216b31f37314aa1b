"""From records to figures: means over problems with bootstrap intervals, paired differences, tables."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from apr_jax.evaluation.records import Record
from apr_jax.evaluation.statistics import Interval, bootstrap

CUT = ("length", "context", "pages", "stalled")  # reasons to end that say that a bound was met


def values(records: Sequence[Record], name: str) -> np.ndarray:
    """One value a problem: `correct`, or a metric."""
    return np.array([r.correct if name == "correct" else r.metrics[name] for r in records], np.float64)


def summarize(records: Sequence[Record]) -> dict[str, float | list[float]]:
    """The figures of one program under one budget.

    Args:
      records: one a problem.

    Returns:
      The mean of every metric over problems, those of the task's own too, and: `accuracy` with its standard error
      `accuracy_se`; `..._interval`, 95% bootstrap intervals of accuracy and of the means that are plotted; shares of
      problems that were `well_formed`, `degraded`, `forked`; the number that was `ended_by_length` (all bounds on
      tokens) and that was `reused`; `run_s`, the wall clock of the whole run, and `tokens_per_s` over it.
    """
    count = len(records)
    accuracy = float(values(records, "correct").mean())
    means = {name: float(values(records, name).mean()) for name in records[0].metrics}
    ran = [record for record in records if record.reused_from is None]
    run_s = sum(record.metrics["engine_s"] for record in ran)
    num_tokens = sum(record.metrics["total_tokens"] + record.metrics["overshoot_tokens"] for record in ran)
    result: dict[str, float | list[float]] = {
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / count),
        "well_formed": sum(record.well_formed for record in records) / count,
        "degraded": sum(bool(record.degraded) for record in records) / count,
        "ended_by_length": sum(record.finish_reason in CUT for record in records),
        "forked": sum(record.metrics["num_threads"] > 1 for record in records) / count,
        **means,
        "sampled_tokens": means["total_tokens"] + means["overshoot_tokens"],
        "reused": count - len(ran),
        "run_s": run_s,
        "tokens_per_s": num_tokens / run_s if run_s else 0.0,
    }
    for name in ("correct", "critical_path_tokens", "total_tokens", "max_context_tokens", "wall_s", "engine_s"):
        interval = bootstrap(values(records, name))
        result[("accuracy" if name == "correct" else name) + "_interval"] = [interval.low, interval.high]
    return result


def paired_difference(records: Sequence[Record], base: Sequence[Record], name: str = "correct") -> Interval:
    """The mean difference to another program on the same problems: what is common to both cancels."""
    assert [r.problem for r in records] == [r.problem for r in base]
    return bootstrap(values(records, name) - values(base, name))


ROWS: list[tuple[str, Callable[[dict], str]]] = [
    ("accuracy", lambda r: f"{r['accuracy']:.1%} ± {r['accuracy_se']:.1%}"),
    ("95% interval", lambda r: "{:.1%} to {:.1%}".format(*r["accuracy_interval"])),
    ("well-formed", lambda r: f"{r['well_formed']:.1%}"),
    ("forked", lambda r: f"{r['forked']:.1%}"),
    ("degraded", lambda r: f"{r['degraded']:.1%}"),
    ("wrong equations", lambda r: f"{r['wrong_equations'] / r['equations']:.2%}" if r.get("equations") else "-"),
    ("runs ended by length", lambda r: f"{r['ended_by_length']}"),
    ("tokens", lambda r: f"{r['total_tokens']:.1f}"),
    ("overshoot", lambda r: f"{r['overshoot_tokens']:.1f}"),
    ("critical path", lambda r: f"{r['critical_path_tokens']:.1f}"),
    ("acceleration ratio", lambda r: f"{r['acceleration_ratio']:.3f}"),
    ("parallel ratio", lambda r: f"{r['parallel_ratio']:.3f}"),
    ("threads", lambda r: f"{r['num_threads']:.2f}"),
    ("peak pages", lambda r: f"{r['peak_pages']:.1f}"),
    ("prefilled again", lambda r: f"{r['reprefill_tokens']:.1f}"),
    ("longest context", lambda r: f"{r['max_context_tokens']:.1f}"),
    ("join time (ms)", lambda r: f"{r['join_s'] * 1e3:.3f}"),
    ("latency at this load (s)", lambda r: f"{r['wall_s']:.2f}"),
    ("engine time a problem (s)", lambda r: f"{r['engine_s']:.3f}"),
    ("tokens a second", lambda r: f"{r['tokens_per_s']:.0f}"),
]


def markdown(results: dict[str, dict], differences: dict[str, Interval], title: str) -> str:
    """One column a row of figures, one line a program and budget; then the paired differences in accuracy."""
    lines = [f"# {title}", "", "| |" + "".join(f" {label} |" for label, _ in ROWS)]
    lines.append("|---|" + "---:|" * len(ROWS))
    for name, result in results.items():
        lines.append(f"| {name} |" + "".join(f" {show(result)} |" for _, show in ROWS))
    lines += [
        "",
        "Means over problems. Accuracy ± standard error; intervals are 95% percentile bootstraps over problems. A run "
        "that was cut counts as wrong unless its answer was there. Engine time: each step's wall clock shared evenly "
        "by the requests in flight, so that it adds up to the whole run's; latency: from a request's submission to "
        "its end, with that many others beside it.",
    ]
    if differences:
        lines += [
            "",
            "| accuracy against the first line, same problems | difference | 95% interval |",
            "|---|---:|---:|",
        ]
        for name, each in differences.items():
            lines.append(f"| {name} | {each.mean:+.1%} | {each.low:+.1%} to {each.high:+.1%} |")
    return "\n".join(lines) + "\n"
