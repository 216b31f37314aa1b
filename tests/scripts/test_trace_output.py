"""--trace as a person uses it: a whole file, whatever becomes of the run."""

import json

import pytest
import trace_output
from absl import flags
from command import run

from apr_jax import Engine
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.program import Request
from apr_jax.testing import byte_tokenizer, tiny_config
from apr_jax.testing.scripted import ScriptedRunner
from apr_jax.types import SamplingParams


def test_a_page_and_a_chrome_trace(tmp_path, countdown):
    common = (f"--checkpoint={countdown}", "--prompt=3 5 7 11 -> 26", "--num_samples=2", "--max_new_tokens=12")
    for name in ("out.html", "out.json"):
        code, _, err = run("generate.py", *common, f"--trace={tmp_path / name}")
        assert code == 0, err
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    told = json.loads(page.partition('id="trace">')[2].partition("</script>")[0])
    assert len(told["requests"]) == 2 and told["requests"][0]["metrics"]["total_tokens"] > 0
    assert told["title"] == "multiverse: <multiverse> 3 5 7 11 -> 26"
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} >= {"request 0", "request 1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_recorded_survives_an_interruption(tmp_path, error):
    path = tmp_path / "out.html"
    steps = iter(range(100))

    def script(thread, ids):
        if next(steps) == 40:
            raise error
        return 97

    runner = ScriptedRunner(script, 4)
    engine = Engine(tiny_config(), None, byte_tokenizer(), runner=runner)
    runner.steps_per_dispatch = engine.config.steps_per_dispatch
    flags.FLAGS(["test", f"--trace={path}"])
    request = Request(token_ids=[65], sampling=SamplingParams(max_new_tokens=90))
    traced = trace_output.traced(engine, trace_output.check_trace_path(), "cut off")
    with pytest.raises(error), traced, Driver(engine) as driver:
        driver.submit(request, engine.make_program("sequential"))
        driver.run()
    told = json.loads(path.read_text(encoding="utf-8").partition('id="trace">')[2].partition("</script>")[0])
    (thread,) = told["threads"]
    assert thread["status"] == "cancelled" and thread["num_tokens"] == 32  # two whole dispatches
    assert not engine.listeners
