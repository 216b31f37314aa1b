"""evaluate.py as a person runs it, on random weights."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from command import SCRIPTS, run

from apr_jax.models.checkpoint import checkpoint_directory, save_checkpoint
from apr_jax.testing import byte_tokenizer, tiny_decoder


def test_every_program_gets_its_means(tmp_path, countdown):
    path = tmp_path / "out.json"
    code, out, err = run(
        "evaluate.py",
        f"--checkpoint={countdown}",
        "--num_problems=5",
        "--seed=3",
        "--max_threads=2",
        "--max_new_tokens=8",
        f"--output_json={path}",
    )
    assert code == 0, err
    content = json.loads(path.read_text())
    assert list(content) == ["task", "num_problems", "seed", "programs"]
    assert (content["task"], content["num_problems"], content["seed"]) == ("countdown", 5, 3)
    assert list(content["programs"]) == ["sequential", "multiverse"]
    for result in content["programs"].values():
        assert result["accuracy"] == result["accuracy_se"] == result["well_formed"] == 0
        assert 0 < result["critical_path_tokens"] <= result["total_tokens"] <= 8
        assert result["num_threads"] == 1 and result["ended_by_length"] == 5
    assert re.search(r"runs ended by length +│ +5 │ +5 │", out)
    assert "5/5" in out and "0.0% ± 0.0%" in out


def test_nothing_that_fits_the_embedded_model_is_cut_by_default():
    config = json.loads((checkpoint_directory("countdown") / "config.json").read_text())
    code, out, _ = run("evaluate.py", "--help")
    found = re.search(r"--max_new_tokens: .*?default: '(\d+)'", out, re.DOTALL)
    assert code == 0 and found and int(found[1]) >= config["max_position_embeddings"]


def test_a_killed_run_goes_on_and_other_settings_are_refused(tmp_path, countdown):
    out = tmp_path / "out"
    args = [
        f"--checkpoint={countdown}",
        "--program=sequential,multiverse+when=first",
        "--num_problems=40",
        "--max_threads=2",
        "--budgets=12,40",
        "--budget_kind=total",
        f"--output_dir={out}",
    ]
    process = subprocess.Popen([sys.executable, SCRIPTS / "evaluate.py", *args], stdout=subprocess.DEVNULL)
    records = out / "records.jsonl"
    deadline_s = time.monotonic() + 200
    while not (records.exists() and records.read_bytes().count(b"\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with records.open("ab") as file:
        file.write(b'{"program": "sequ')  # as if the kill had come within a line
    (countdown / "README.md").write_text("What is written about a model does not change it.")
    kept = records.read_text().splitlines()[:-1]
    assert 3 < len(kept) < 161

    code, shown, err = run("evaluate.py", *args, f"--output_json={tmp_path / 'old.json'}")
    assert code == 0, err
    lines = records.read_text().splitlines()
    assert lines[: len(kept)] == kept and len(lines) == 1 + 2 * 2 * 40
    content = json.loads((out / "results.json").read_text())
    labels = [f"{name}@total={n}" for name in ("sequential", "multiverse+when=first") for n in (12, 40)]
    assert list(content["programs"]) == labels
    for label, result in content["programs"].items():
        assert result["total_tokens"] <= int(label.rpartition("=")[2])
        low, high = result["total_tokens_interval"]
        assert low <= result["total_tokens"] <= high
    assert content["accuracy_differences"][labels[1]] == {"to": labels[0], "mean": 0, "interval": [0, 0]}
    assert json.loads((tmp_path / "old.json").read_text())["programs"] == content["programs"]
    table = (out / "table.md").read_text()
    assert all(f"| {label} |" in table for label in labels) and "80/80" in shown
    for name in ("critical_path", "total_tokens", "context", "wall_clock"):
        assert (out / f"accuracy_by_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"accuracy_by_{name}.svg").read_text()

    code, _, err = run("evaluate.py", *args, "--temperature=0.5")
    assert code == 2 and "holds results with sampling = " in err and "asked for is" in err
    assert records.read_text().splitlines() == lines


def test_without_matplotlib_the_rest_is_written(tmp_path, countdown):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    command = [sys.executable, SCRIPTS / "evaluate.py", f"--checkpoint={countdown}", "--program=sequential"]
    command += ["--num_problems=2", "--max_new_tokens=4", f"--output_dir={tmp_path / 'out'}"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no plots: matplotlib is not installed") == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"records.jsonl", "results.json", "table.md"}


def test_problems_of_a_dialled_kind(tmp_path, countdown):
    args = (f"--checkpoint={countdown}", "--num_problems=2", "--max_new_tokens=4")
    large = "--task=countdown+num_numbers=6+min_target=200+max_target=300"
    code, _, err = run("evaluate.py", *args, large, "--program=multiverse", f"--output_json={tmp_path / 'out.json'}")
    assert code == 0, err
    content = json.loads((tmp_path / "out.json").read_text())
    assert (content["task"], content["num_problems"]) == (large.removeprefix("--task="), 2)
    code, _, err = run("evaluate.py", *args, large, "--program=multiverse,apr")
    assert code == 2 and "must be <= 100 in APR's text" in err


def test_problems_of_the_users_own(tmp_path):
    pytest.importorskip("math_verify")
    save_checkpoint(tmp_path / "model", tiny_decoder(), byte_tokenizer())
    problems = tmp_path / "problems.jsonl"
    lines = [{"problem": "1+1?", "answer": "2"}, {"question": "2/4?", "solution": r"\boxed{\frac{1}{2}}"}]
    problems.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"problem": "x?", "answer": 3}]))
    args = ["--task=math", f"--checkpoint={tmp_path / 'model'}", f"--problems={problems}", "--max_new_tokens=8"]
    code, _, err = run(
        "evaluate.py",
        *args,
        "--program=sequential,self_consistency+num_samples=2",
        r"--prompt_template={problem} \boxed{",
        f"--output_dir={tmp_path / 'out'}",
    )
    assert code == 0, err
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (content["task"], content["num_problems"]) == ("math", 3)
    assert content["programs"]["sequential"]["num_threads"] == 1
    assert content["programs"]["self_consistency+num_samples=2"]["num_threads"] == 3
    with problems.open("a") as file:
        file.write('{"problem": "y?"}\n')
    code, _, err = run("evaluate.py", *args)
    assert code == 2 and "line 4: has none of the fields answer, solution" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--program=sequential,parallel",), "--program=parallel is not one of sequential, multiverse"),
        (("--num_problems=0",), "--num_problems=0, must be >= 1"),
        (
            ("--task=sudoku",),
            "--task=sudoku is not one of countdown, countdown_five, countdown_hard, math",
        ),
        (("--temperature=-1",), "temperature is -1.0, must be >= 0"),
        (("--budgets=256,0",), "--budgets has '0', must be numbers of tokens >= 1, or unlimited"),
        (("--program=multiverse+when=soon",), "--program=multiverse+when=soon: when is 'soon', must be all, first,"),
        (("--when=quorum",), "--when=quorum, must be all, first, quorum:K or deadline:TOKENS"),
        (("--program=sequential+when=first",), "sequential has no option 'when', it takes none"),
        (("--program=multiverse+num_samples=3",), "multiverse has no option 'num_samples', it takes join, when"),
        (("--task=math",), "--task=math needs --problems=FILE.jsonl"),
        (("--problems=x.jsonl",), "--problems goes with --task=math only, not with --task=countdown"),
        (("--output_dir=/dev/null",), "cannot write into /dev/null: it is there, and no directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message):
    code, _, err = run("evaluate.py", *args)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("error: ") and message in err
