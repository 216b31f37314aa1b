"""The figures of the embedded model's card, from what evaluate.py has written about one held-out set of Countdown.

Ratios are of the summed critical path to the summed tokens of the sequential program, on the problems that the search
does not solve inline (they fork) and on the harder half of those; in brackets those of the search itself. A solution
counts as found within a budget if the problem's critical path is no longer.

Example:
  python scripts/evaluate.py --num_problems=1000 --program=sequential,multiverse,npr,threadweaver,apr \\
    --max_threads=64 --max_new_tokens=1900 --output_dir=out
  python scripts/countdown_card.py --records=out/records.jsonl
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import cli
import numpy as np
from absl import flags

from apr_jax.config import check
from apr_jax.evaluation.records import Record, read_records
from apr_jax.evaluation.summary import values
from apr_jax.tasks.countdown import Problem
from apr_jax.tasks.countdown_renderings import RENDERINGS
from apr_jax.tasks.countdown_search import ReasoningTree, search
from apr_jax.tasks.countdown_task import TASKS
from apr_jax.tasks.trace import Span, Trace, critical_path

SEQUENTIAL = "sequential"

_RECORDS = flags.DEFINE_string("records", None, "The records.jsonl of an evaluation of countdown or one of its sets.")
_BUDGET = flags.DEFINE_integer(
    "budget", None, "Tokens of critical path that solutions are counted within. None: the adaptive programs' median."
)


def main() -> None:
    if _RECORDS.value is None:
        raise ValueError("--records=FILE is needed")
    check(_BUDGET.value is None or _BUDGET.value >= 1, f"--budget={_BUDGET.value}, must be >= 1")
    problems, records = read_evaluation(Path(_RECORDS.value))
    print(markdown(problems, records, _BUDGET.value), end="")


def read_evaluation(path: Path) -> tuple[list[Problem], dict[str, list[Record]]]:
    """The problems, and each program's records of them in order, those without a budget.

    Raises:
      ValueError: it is no evaluation's file, the task is not Countdown's, or the programs' problems differ.
    """
    settings, records = read_records(path)
    task = str(settings.get("task"))
    check(task in TASKS, f"{path} is of the task {task}, must be one of {', '.join(TASKS)}")
    by_program: dict[str, dict[int, Record]] = {name: {} for name in RENDERINGS}
    for record in records:
        if record.budget is None and record.program in by_program:
            by_program[record.program][record.problem] = record
    found = {name: [records[i] for i in sorted(records)] for name, records in by_program.items() if records}
    check(SEQUENTIAL in found, f"{path} has no records of {SEQUENTIAL}, which the others are compared with")
    count = len(found[SEQUENTIAL])
    for name, records in found.items():
        same = [record.problem for record in records] == list(range(count))
        check(same, f"{path}: the problems of {name} are not the first {count}, which {SEQUENTIAL} has")
    return TASKS[task].problems(count, settings["seed"]), found


def markdown(problems: Sequence[Problem], records: dict[str, list[Record]], budget: int | None) -> str:
    """The card's table, one column a program."""
    trees = [search(problem) for problem in problems]
    paths = {name: values(found, "critical_path_tokens") for name, found in records.items()}
    reference = {name: np.array([sampled_path(RENDERINGS[name](tree)) for tree in trees]) for name in records}
    forks = np.array([i for i, tree in enumerate(trees) if _forks(tree)], np.int64)
    harder = forks[np.argsort(reference[SEQUENTIAL][forks], kind="stable")][len(forks) // 2 :]
    if budget is None:
        adaptive = [path for name, path in paths.items() if name != SEQUENTIAL]
        budget = int(np.median(np.concatenate(adaptive or [paths[SEQUENTIAL]])))

    def ratio(where: np.ndarray) -> Callable[[str], str]:
        def show(name: str) -> str:
            own, perfect = (each[name][where].sum() / each[SEQUENTIAL][where].sum() for each in (paths, reference))
            return f"{own:.2f} ({perfect:.2f})"

        return show

    rows: list[tuple[str, Callable[[str], str]]] = [
        ("solved", lambda name: _share(values(records[name], "correct"))),
        ("well-formed", lambda name: _share(np.array([r.well_formed for r in records[name]]))),
        ("wrong equations", lambda name: _wrong_equations(records[name])),
        ("tokens", lambda name: _mean(values(records[name], "total_tokens"))),
        ("critical path", lambda name: _mean(paths[name])),
        (f"within {budget}", lambda name: _share(values(records[name], "correct") * (paths[name] <= budget))),
    ]
    if len(forks) > 1:
        rows += [("ratio, forking", ratio(forks)), ("ratio, harder half", ratio(harder))]
    solved = sum(tree.solution is not None for tree in trees) / len(trees)
    lines = [
        f"{len(problems)} problems, of which {len(forks)} fork; the search solves {solved:.1%}.",
        "",
        "| | " + " | ".join(records) + " |",
        "|---|" + "---:|" * len(records),
        *(f"| {label} | " + " | ".join(map(show, records)) + " |" for label, show in rows),
    ]
    return "\n".join(lines) + "\n"


def sampled_path(trace: Trace) -> int:
    """A reference trace's critical path without its prompt."""
    first = trace[0]
    return critical_path(trace) - (first.forced if isinstance(first, Span) else 0)


def _forks(tree: ReasoningTree) -> bool:
    return tree.opening.solution is None and bool(tree.blocks)


def _share(hits: np.ndarray) -> str:
    share = float(hits.mean())
    return f"{share:.1%} ± {math.sqrt(share * (1 - share) / len(hits)) * 100:.1f}"


def _mean(counts: np.ndarray) -> str:
    return f"{counts.mean():,.0f} ± {counts.std() / math.sqrt(len(counts)):,.0f}"


def _wrong_equations(records: Sequence[Record]) -> str:
    wrong, written = (values(records, name).sum() for name in ("wrong_equations", "equations"))
    return f"{wrong / written:.2%}" if written else "-"


if __name__ == "__main__":
    cli.run(main)
