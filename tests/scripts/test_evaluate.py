"""evaluate.py as a person runs it, on random weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apr_jax.tasks.countdown_format import vocabulary
from apr_jax.testing import tiny_config, tiny_decoder
from apr_jax.train.export import export_countdown

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(*args):
    done = subprocess.run(
        [sys.executable, SCRIPTS / "evaluate.py", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def countdown(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "countdown"
    config = tiny_config(vocab_size=len(vocabulary()), bos_id=1, eos_ids=(2,), tie_embeddings=True)
    export_countdown(directory, tiny_decoder(config))
    return directory


def test_every_program_gets_its_means(tmp_path, countdown):
    path = tmp_path / "out.json"
    code, out, err = run(
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
        assert result["num_threads"] == 1
    assert "5/5" in out and "0.0% ± 0.0%" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--program=sequential,parallel",), "--program=parallel is not one of sequential, multiverse"),
        (("--num_problems=0",), "--num_problems=0, must be >= 1"),
        (("--task=sudoku",), "flag --task=sudoku: value should be one of <countdown>"),
        (("--temperature=-1",), "temperature is -1.0, must be >= 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message):
    code, _, err = run(*args)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("error: ") and message in err
