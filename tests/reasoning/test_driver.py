"""The driver: many requests side by side, cancellation, programs that are wrong."""

import pytest
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.engine import events
from apr_jax.engine.thread import Status
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.output import GenerateError
from apr_jax.reasoning.program import (
    Append,
    Finish,
    Guards,
    Program,
    Request,
    Wait,
)
from apr_jax.testing import byte_tokenizer, tiny_config
from apr_jax.types import SamplingParams

PLAN = "<Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
LONG = SamplingParams(max_new_tokens=300)


def forking_script(tokenizer):
    texts = {"": f"{PLAN} end", "0.0": " x" * 20 + "</Path>", "0.1": " y</Path>"}
    return Transcripts(tokenizer, texts)


class Broken(Program):
    """Never forks, and fails where a prompt that ends in b stops."""

    name = "broken"
    block = None

    def start(self, request):
        return Append(sampling=request.sampling)

    def on_stop(self, thread, stop):
        if thread.prompt_ids[-1] == ord("b"):
            raise KeyError("a bug")
        return Finish(stop.reason)

    def on_child(self, parent, ended, running):
        return Wait()


def test_requests_side_by_side_say_what_each_says_alone():
    tokenizer = byte_tokenizer()
    alone = scripted_engine(forking_script(tokenizer), tokenizer).generate("P", "multiverse", sampling=LONG)
    engine = scripted_engine(forking_script(tokenizer), tokenizer, num_pages=64, max_threads=4)
    outs = engine.generate(["P"] * 9, "multiverse", sampling=LONG)
    assert [out.text for out in outs] == [alone.text] * 9
    costs = ("total_tokens", "critical_path_tokens", "acceleration_ratio", "parallel_ratio", "num_threads")
    for out in outs:
        assert [getattr(out.metrics, c) for c in costs] == [getattr(alone.metrics, c) for c in costs]
    assert_all_pages_free(engine)


def test_results_come_as_they_finish():
    tokenizer = byte_tokenizer()
    engine = scripted_engine(forking_script(tokenizer), tokenizer, steps_per_dispatch=2)
    with Driver(engine) as driver:
        program = engine.make_program("multiverse")
        requests = [Request(token_ids=[1, 2], sampling=SamplingParams(max_new_tokens=n)) for n in (200, 5, 30)]
        runs = [driver.submit(request, program) for request in requests]
        order = []
        while driver.active:
            order += driver.step()
    assert [runs.index(run) for run in order] == [1, 2, 0]
    assert_all_pages_free(engine)


@pytest.mark.parametrize("steps", range(0, 24, 3))
def test_cancelling_at_any_moment_frees_all_pages(steps):
    tokenizer = byte_tokenizer()
    engine = scripted_engine(forking_script(tokenizer), tokenizer, steps_per_dispatch=2)
    with Driver(engine) as driver:
        program = engine.make_program("multiverse")
        run, other = (driver.submit(Request(token_ids=[i], sampling=LONG), program) for i in (1, 2))
        for _ in range(steps):
            driver.step()
        driver.cancel(run)
        driver.run()
    assert run.finish_reason == "cancelled"
    assert engine.collect(other).text.endswith("<Conclusion> end")
    assert_all_pages_free(engine)


def test_a_child_cancelled_from_outside_does_not_hang_its_parent():
    tokenizer = byte_tokenizer()
    engine = scripted_engine(forking_script(tokenizer), tokenizer, steps_per_dispatch=2)
    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=[1], sampling=LONG), engine.make_program("multiverse"))
        while len(run.root.children) < 2:
            driver.step()
        for child in run.root.children:
            engine.cancel(child)
        driver.run()
    out = engine.collect(run)
    assert out.text == f"{PLAN}<Conclusion> end"
    assert [thread.status for thread in out.threads] == ["finished", "cancelled", "cancelled"]
    assert_all_pages_free(engine)


def test_an_error_of_a_program_ends_its_request_only():
    tokenizer = byte_tokenizer()
    engine = scripted_engine(forking_script(tokenizer), tokenizer)
    with Driver(engine) as driver:
        broken = driver.submit(Request(token_ids=[ord("b")], sampling=LONG), Broken())
        sound = driver.submit(Request(token_ids=[2], sampling=LONG), engine.make_program("multiverse"))
        driver.run()
    assert isinstance(broken.error, KeyError) and broken.finish_reason == "error"
    assert sound.error is None and sound.finish_reason == "eos"
    assert_all_pages_free(engine)
    with pytest.raises(KeyError, match="a bug"):
        engine.generate("b", Broken())


def test_leaving_the_driver_cancels_what_still_runs():
    tokenizer = byte_tokenizer()
    engine = scripted_engine(forking_script(tokenizer), tokenizer)
    with pytest.raises(RuntimeError, match="stop here"), Driver(engine) as driver:
        run = driver.submit(Request(token_ids=[1], sampling=LONG), engine.make_program("multiverse"))
        driver.step()
        raise RuntimeError("stop here")
    assert run.finish_reason == "cancelled"
    assert_all_pages_free(engine)


def test_a_bad_prompt_in_a_list_leaves_nothing_behind():
    tokenizer = byte_tokenizer()
    engine = scripted_engine(forking_script(tokenizer), tokenizer, model_config=tiny_config(max_position=32))
    with pytest.raises(ValueError, match="41 tokens, the context window is 32"):
        engine.generate(["fine", "x" * 40], "multiverse")
    assert_all_pages_free(engine)
    for empty in ("", []):
        with pytest.raises(ValueError, match="the prompt is empty"):
            engine.generate(empty)
    with pytest.raises(ValueError, match="'mutliverse' is not one of sequential, multiverse"):
        engine.generate("x", "mutliverse")


def test_the_context_window_bounds_the_critical_path():
    tokenizer = byte_tokenizer()
    engine = scripted_engine(forking_script(tokenizer), tokenizer, model_config=tiny_config(max_position=40))
    out = engine.generate([1] * 10, "multiverse", sampling=LONG)
    assert out.metrics.critical_path_tokens == 30
    assert out.finish_reason == "context"
    assert_all_pages_free(engine)


def test_samples_have_seeds_of_their_own():
    tokenizer = byte_tokenizer()
    seen = []

    def script(thread, ids):
        seen.append(thread.family.seed)
        return tokenizer.eos_ids[0]

    engine = scripted_engine(script, tokenizer)
    outs = engine.generate(["P", "Q"], sampling=SamplingParams(seed=7), num_samples=3)
    assert len(outs) == 6
    assert sorted(set(seen)) == [7, 8, 9]
    one = engine.generate([5, 6], guards=Guards())
    assert one.finish_reason == "eos" and one.text == ""


def test_released_threads_stay_readable():
    tokenizer = byte_tokenizer()
    engine = scripted_engine(forking_script(tokenizer), tokenizer)
    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=[1], sampling=LONG), engine.make_program("multiverse"))
        driver.run()
    assert all(thread.status is Status.FINISHED for thread in run.root.family.threads)
    assert engine.collect(run).text == f"{PLAN}<Path>1:{' x' * 20}</Path><Path>2: y</Path><Conclusion> end"


@pytest.mark.parametrize("kind", [events.ForkEvent, events.JoinEvent, events.FinishEvent, events.DegradeEvent])
def test_a_request_ends_once_even_if_a_listener_cancels_it_meanwhile(kind):
    tokenizer = byte_tokenizer()
    script = Transcripts(tokenizer, {"": f"{PLAN} end", "0.0": "x</Path>", "0.1": "y"})  # the second has no closer
    engine = scripted_engine(script, tokenizer)
    seen = []
    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=[1], sampling=LONG), engine.make_program("multiverse"))

        def cancel(event):
            if isinstance(event, kind):
                seen.append(event)
                driver.cancel(run)

        engine.listeners.append(cancel)
        done = []
        while driver.active:
            done += driver.step()
        done += driver.step() if engine.has_work else []
    assert seen and done == [run] and run.error is None
    ended = isinstance(seen[0], events.FinishEvent) and seen[0].thread_id == run.root.id
    assert run.finish_reason == ("eos" if ended else "cancelled")
    assert_all_pages_free(engine)


def test_the_other_outputs_of_a_call_outlive_an_error():
    tokenizer = byte_tokenizer()
    engine = scripted_engine(Transcripts(tokenizer, {"": "yes"}), tokenizer)
    with pytest.raises(GenerateError, match="1 of 3 requests failed, the first is number 1: KeyError: 'a bug'") as info:
        engine.generate(["a", "b", "c"], Broken())
    outputs, errors = info.value.outputs, info.value.errors
    assert [out.finish_reason for out in outputs] == ["eos", "error", "eos"]
    assert [out.text for out in outputs] == ["yes"] * 3
    assert list(errors) == [1] and info.value.__cause__ is errors[1]
    assert_all_pages_free(engine)
