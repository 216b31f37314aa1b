"""evaluate.py as a person runs it, on random weights."""

import json
import re

import pytest
from command import run

from apr_jax.models.checkpoint import checkpoint_directory


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
    assert re.search(r"runs ended by length │ +5 │ +5 │", out)
    assert "5/5" in out and "0.0% ± 0.0%" in out


def test_nothing_that_fits_the_embedded_model_is_cut_by_default():
    config = json.loads((checkpoint_directory("countdown") / "config.json").read_text())
    code, out, _ = run("evaluate.py", "--help")
    found = re.search(r"--max_new_tokens: .*?default: '(\d+)'", out, re.DOTALL)
    assert code == 0 and found and int(found[1]) >= config["max_position_embeddings"]


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
    code, _, err = run("evaluate.py", *args)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("error: ") and message in err
