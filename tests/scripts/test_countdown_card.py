"""The card's figures, from records whose figures are known."""

import json

import pytest
from command import run

from apr_jax.evaluation.records import Record
from apr_jax.tasks.countdown import Problem
from apr_jax.tasks.countdown_search import quad
from apr_jax.tasks.countdown_sets import held_out_problems
from apr_jax.tasks.countdown_task import HELD_OUT_SEED, TASKS

COUNT = 12


def opening_solves(problem: Problem) -> bool:
    """Whether the two smallest numbers against the two largest make the target."""
    low, high = quad(*problem.numbers[:2]), quad(*problem.numbers[2:])
    return any(problem.target in quad(a, b) for a in low for b in high if a is not None and b is not None)


def record(program: str, problem: int, tokens: int, path: int, correct: bool) -> str:
    metrics = {"total_tokens": tokens, "critical_path_tokens": path, "equations": 20, "wrong_equations": problem == 0}
    return Record(
        program=program, budget=None, problem=problem, seed=1, settings="", correct=correct, answer=None, reason=None,
        finish_reason="stop", well_formed=True, degraded=[], metrics=metrics, needed={},
    ).to_json()  # fmt: skip


def write(path, lines, task="countdown", seed=HELD_OUT_SEED) -> None:
    settings = {"task": task, "seed": seed}
    path.write_text("\n".join([json.dumps({"settings": settings}), *lines]) + "\n")


def test_paths_are_compared_where_problems_fork(tmp_path):
    lines = []
    for i, problem in enumerate(held_out_problems("apr")[:COUNT]):
        inline = opening_solves(problem)
        lines.append(record("sequential", i, 100, 100, correct=i < 9))
        lines.append(record("multiverse", i, 120, 100 if inline else 40, correct=i < 6))
    write(tmp_path / "records.jsonl", reversed(lines))
    code, out, err = run("countdown_card.py", f"--records={tmp_path}/records.jsonl", "--budget=99")
    assert code == 0, err
    rows = {cells[1]: cells[2:4] for line in out.splitlines() if len(cells := [c.strip() for c in line.split("|")]) > 3}
    assert rows["solved"] == ["75.0% ± 12.5", "50.0% ± 14.4"]
    assert rows["wrong equations"] == ["0.42%", "0.42%"]
    assert rows["tokens"] == ["100 ± 0", "120 ± 0"]
    assert [value.split()[0] for value in rows["ratio, forking"]] == ["1.00", "0.40"]
    forked_and_solved = sum(not opening_solves(problem) for problem in held_out_problems("apr")[:6])
    assert [value.split()[0] for value in rows["within 99"]] == ["0.0%", f"{forked_and_solved / COUNT:.1%}"]


def test_where_no_problem_forks_there_are_no_ratios(tmp_path):
    seed = next(seed for seed in range(2, 99) if opening_solves(TASKS["countdown"].problems(1, seed)[0]))
    write(tmp_path / "records.jsonl", [record("sequential", 0, 100, 100, correct=True)], seed=seed)
    code, out, err = run("countdown_card.py", f"--records={tmp_path}/records.jsonl")
    assert code == 0, err
    assert "1 problems, of which 0 fork" in out and "within 100" in out and "ratio" not in out


@pytest.mark.parametrize(
    ("lines", "task", "message"),
    [
        ([record("multiverse", 0, 1, 1, True)], "countdown", "has no records of sequential"),
        ([record("sequential", 0, 1, 1, True), record("apr", 1, 1, 1, True)], "countdown", "apr are not the first 1"),
        ([], "math", "is of the task math"),
        ([record("sequential", 0, 1, 1, True)[:-9]], "countdown", "line 2 is no record"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, lines, task, message):
    write(tmp_path / "records.jsonl", lines, task)
    code, out, err = run("countdown_card.py", f"--records={tmp_path}/records.jsonl")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and message in err
