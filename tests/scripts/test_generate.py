"""generate.py as a person runs it, on models of the real formats with random weights."""

import json
import re

import pytest
from command import run

from apr_jax.models.hf import export_hf
from apr_jax.testing import byte_tokenizer, tiny_config, tiny_decoder

METRICS = [
    "total_tokens",
    "overshoot_tokens",
    "critical_path_tokens",
    "acceleration_ratio",
    "parallel_ratio",
    "num_threads",
    "wall_s",
    "peak_pages",
    "reprefill_tokens",
    "flush_tokens",
    "join_s",
    "max_context_tokens",
    "sequence_tokens",
    "num_children",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    export_hf(directory, tiny_decoder(tiny_config(max_position=128)), byte_tokenizer())
    return directory


def test_one_object_with_every_key(tmp_path, model):
    path = tmp_path / "out.json"
    code, out, err = run(
        "generate.py", f"--checkpoint={model}", "--prompt=Hello", "--max_new_tokens=20", f"--output_json={path}"
    )
    assert code == 0, err
    content = json.loads(path.read_text())
    keys = ["text", "answer", "correct", "program", "threads", "metrics", "finish_reason", "degraded"]
    assert list(content) == keys
    assert list(content["metrics"]) == METRICS
    assert content["program"] == "multiverse" and content["correct"] is None
    root = content["threads"][0]
    assert list(root) == ["id", "parent", "status", "token_ids", "text", "start_position"]
    assert (root["id"], root["parent"], root["status"], root["start_position"]) == (0, None, "finished", 0)
    assert content["metrics"]["total_tokens"] == len(root["token_ids"]) <= 20
    lines = out.splitlines()
    assert lines[0] == "prompt: Hello"
    assert any(line.startswith("thread 0: ") for line in lines)
    assert any("critical_path_tokens" in line for line in lines)
    assert any(re.search(r"unused slots in pages of 16: \d+ at most", line) for line in lines)


def test_samples_differ_and_are_reproducible(tmp_path, countdown):
    contents = []
    for name in ("a.json", "b.json"):
        code, out, err = run(
            "generate.py",
            f"--checkpoint={countdown}",
            "--prompt=3 5 7 11 -> 26",
            "--program=sequential",
            "--temperature=1",
            "--num_samples=3",
            "--max_new_tokens=12",
            "--seed=5",
            f"--output_json={tmp_path / name}",
        )
        assert code == 0, err
        assert out.splitlines()[0] == "prompt: <sequential> 3 5 7 11 -> 26"
        assert out.count("verdict: wrong: there is no answer") == 3
        contents.append(json.loads((tmp_path / name).read_text()))
    texts = [sample["text"] for sample in contents[0]["samples"]]
    assert len(set(texts)) == 3
    assert texts == [sample["text"] for sample in contents[1]["samples"]]
    assert contents[0]["text"] == texts[0] and contents[0]["correct"] is False


def test_a_checkpoint_of_any_name_is_asked_its_task(tmp_path, countdown):
    (tmp_path / "mine").symlink_to(countdown)
    code, out, err = run("generate.py", f"--checkpoint={tmp_path / 'mine'}", "--task=countdown", "--max_new_tokens=4")
    assert code == 0, err
    assert out.splitlines()[0] == "prompt: <multiverse> 22 26 31 53 -> 27" and "verdict: wrong" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt=",), "--prompt='' is empty: at least 1 token is needed"),
        (("--prompt=" + "x" * 128,), "the prompt has 129 tokens, the context window is 128"),
        (("--prompt=x", "--program=mutliverse"), "--program=mutliverse is not one of"),
        (("--prompt=x", "--temperature=-0.5"), "temperature is -0.5, must be >= 0"),
        (("--prompt=x", "--max_new_tokens=0"), "--max_new_tokens=0, must be >= 1"),
        (("--prompt=x", "--top_p=0"), "top_p is 0.0, must be in (0, 1]"),
        (("--prompt=x", "--parallelism=maybe"), "flag --parallelism=maybe"),
        (("--prompt=x", "--max_family_pages=0"), "max_family_pages is 0, must be >= 1"),
        (("--prompt=x", "--max_wall_s=0"), "max_wall_s is 0.0, must be > 0 and finite"),
        (("--prompt=x", "--num_samples=0"), "--num_samples=0, must be >= 1"),
        (("--prompt=x", "--cpu_threads=0"), "--cpu_threads=0, must be >= 1"),
        (("--prompt=x", "--tensor=2"), "tensor is 2, there are 1 devices"),
        (("--prompt=x", "--attention=pallas"), "no Pallas kernel runs on cpu"),
        (("--prompt=x", "--checkpoint=missing"), "no checkpoint 'missing': expected a directory or an embedded model"),
        (("--prompt=x", "--checkpoint={folder}"), "is no checkpoint: it holds neither"),
        ((), "--prompt is needed with --checkpoint="),
        (("--prompt=x", "--task=math", "--problems=x.jsonl"), "No such file"),
        (("--prompt=x", "--task=chess"), "--task=chess is not one of countdown"),
        (("--prompt=x", "--problems=x.jsonl"), "--problems goes with --task=math only, not with --task=countdown"),
        (("--prompt=x", "--output_json={folder}/missing/out.json"), "there is no directory"),
        (("--prompt=x", "--output_json={folder}"), "it is there, and no file"),
        (("--prompt=x", "--trace=out.txt"), "--trace=out.txt ends in none of .html, .json"),
        (("--prompt=x", "--trace={folder}/missing/out.html"), "there is no directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, model, args, message):
    given = [arg.replace("{folder}", str(tmp_path)) for arg in args]
    code, _, err = run("generate.py", f"--checkpoint={model}", *given, f"--output_json={tmp_path / 'out.json'}", *given)
    lines = [line for line in err.splitlines() if not line.startswith("I")]
    assert code == 2 and len(lines) == 1, err
    assert lines[0].startswith("error: ") and message in lines[0]
    assert not list(tmp_path.iterdir())
