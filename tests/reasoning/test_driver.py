"""The driver: many requests side by side, cancellation, programs that are wrong, actions of strategies."""

import dataclasses

import pytest
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.engine import events
from apr_jax.engine.thread import Status
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.grammar import GrammarProgram
from apr_jax.reasoning.grammars.multiverse import MULTIVERSE
from apr_jax.reasoning.output import GenerateError
from apr_jax.reasoning.program import (
    Append,
    Cancel,
    Finish,
    Fork,
    Guards,
    Join,
    Keep,
    Program,
    Request,
    Spawn,
    Wait,
)
from apr_jax.testing import byte_tokenizer, tiny_config
from apr_jax.types import SamplingParams

PLAN = "<Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
LONG = SamplingParams(max_new_tokens=300)


def forking_script(tokenizer):
    texts = {"": f"{PLAN} end", "0.0": " x" * 20 + "</Path>", "0.1": " y</Path>"}
    return Transcripts(tokenizer, texts)


class Sampler(Program):
    """Forks the prompt into children that say something each, then does what a test wants with them."""

    name = "sampler"
    block = None

    def __init__(self, count: int, decide, split=Fork, prompts=None):
        self.prompts = prompts or [[]] * count
        self.decide = decide
        self.split = split

    def start(self, request):
        return self.split(self.prompts, request.sampling)

    def on_stop(self, thread, stop):
        return Finish(stop.reason)

    def on_child(self, parent, ended, running):
        return self.decide(parent, ended, running)


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

    class Broken(Program):
        name = "broken"
        block = None

        def start(self, request):
            return Append(sampling=dataclasses.replace(request.sampling, max_new_tokens=3))

        def on_stop(self, thread, stop):
            raise KeyError("a bug")

        def on_child(self, parent, ended, running):
            return Wait()

    engine = scripted_engine(forking_script(tokenizer), tokenizer)
    with Driver(engine) as driver:
        broken = driver.submit(Request(token_ids=[1], sampling=LONG), Broken())
        sound = driver.submit(Request(token_ids=[2], sampling=LONG), engine.make_program("multiverse"))
        driver.run()
    assert isinstance(broken.error, KeyError) and broken.finish_reason == "error"
    assert sound.error is None and sound.finish_reason == "eos"
    assert_all_pages_free(engine)
    with pytest.raises(KeyError, match="a bug"):
        engine.generate("P", Broken())


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


def test_degradations_are_told_as_events():
    tokenizer = byte_tokenizer()
    engine = scripted_engine(Transcripts(tokenizer, {"": "a</Path>b"}), tokenizer)
    told = []
    engine.listeners.append(told.append)
    out = engine.generate("P", "multiverse")
    assert [e.reason for e in told if isinstance(e, events.DegradeEvent)] == ["</Path> outside of a thread"]
    assert len(out.degraded) == 1


@pytest.mark.parametrize("split", [Fork, Spawn])
def test_a_fork_of_the_prompt_keeps_one_child(split):
    tokenizer = byte_tokenizer()
    script = Transcripts(tokenizer, {"": "", "0.0": "one", "0.1": "two", "0.2": "three"})

    def decide(parent, ended, running):
        if running:
            return Wait()
        if len(ended) > 1:
            return Keep([ended[1]])
        return Join(ended, "select", tokenizer.encode("!"))

    engine = scripted_engine(script, tokenizer)
    prompts = [tokenizer.encode("p")] * 3
    out = engine.generate("P", Sampler(3, decide, split, prompts), sampling=LONG)
    header = "p" if split is Fork else ""
    assert out.text == f"{header}two!"
    assert [thread.status for thread in out.threads] == ["finished", "cancelled", "finished", "cancelled"]
    assert_all_pages_free(engine)


def test_cancel_asks_again_until_the_program_joins():
    tokenizer = byte_tokenizer()
    script = Transcripts(tokenizer, {"": "", "0.0": "quick", "0.1": "slow" * 50, "0.2": "slow" * 50})

    def decide(parent, ended, running):
        return Cancel(running[:1]) if running else Join(ended, "stitch", tokenizer.encode("!"))

    engine = scripted_engine(script, tokenizer)
    out = engine.generate("P", Sampler(3, decide), sampling=LONG)
    assert out.text == "quick!"
    assert [thread.status for thread in out.threads] == ["finished", "finished", "cancelled", "cancelled"]
    assert_all_pages_free(engine)


def test_a_program_that_waits_for_nothing_ends():
    tokenizer = byte_tokenizer()
    script = Transcripts(tokenizer, {"": "", "0.0": "a", "0.1": "b"})
    engine = scripted_engine(script, tokenizer)
    out = engine.generate("P", Sampler(2, lambda *_: Wait()), sampling=LONG)
    assert out.finish_reason == "stalled"
    assert out.degraded == ["thread 0: the program waits for nothing"]
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


def test_children_with_too_many_stops_degrade():
    tokenizer = byte_tokenizer()
    grammar = dataclasses.replace(MULTIVERSE, join="conclusion", conclusion_marker="<Goal>")
    stops = dataclasses.replace(LONG, stop_ids=(1, 2, 3, 4, 5))  # with two tags and the end: 8; in children 9
    engine = scripted_engine(Transcripts(tokenizer, {"": f"{PLAN} end"}), tokenizer)
    out = engine.generate("P", GrammarProgram(grammar, tokenizer), sampling=stops)
    assert out.text == f"{PLAN} end" and out.finish_reason == "eos" and len(out.threads) == 1
    (reason,) = out.degraded
    assert reason.startswith("thread 0: fork refused: 9 stop ids, those of the program's tags")
    with pytest.raises(ValueError, match=r"10 stop ids, those of the program's tags and .* max_stop_ids is 8"):
        engine.generate("P", "multiverse", sampling=dataclasses.replace(LONG, stop_ids=(1, 2, 3, 4, 5, 6, 7)))
    assert_all_pages_free(engine)


def test_a_programs_too_many_stops_are_refused_at_the_start_or_left_out():
    tokenizer = byte_tokenizer()
    many = SamplingParams(max_new_tokens=9, stop_ids=tuple(range(9)))

    class Stops(Sampler):
        def start(self, request):
            return Fork([[]], many) if self.split is Fork else Append(sampling=request.sampling)

        def on_stop(self, thread, stop):
            return Finish(stop.reason) if thread.num_sampled > 3 else Append(tokenizer.encode("!"), many)

    engine = scripted_engine(Transcripts(tokenizer, {"": "one" * 20}), tokenizer)
    with pytest.raises(ValueError, match="10 stop ids"):
        engine.generate("P", Stops(1, None), sampling=LONG)
    out = engine.generate("P", Stops(1, None, Spawn), sampling=dataclasses.replace(LONG, stop=("o",)))
    assert out.text == "o!neo" and out.finish_reason == "stop_string"
    (reason,) = out.degraded
    assert reason.startswith("thread 0: its own sampling parameters are kept: 10 stop ids")
    assert_all_pages_free(engine)


def test_the_other_outputs_of_a_call_outlive_an_error():
    tokenizer = byte_tokenizer()

    class Fails(Program):
        name = "fails"
        block = None

        def start(self, request):
            return Append(sampling=request.sampling)

        def on_stop(self, thread, stop):
            if thread.prompt_ids[-1] == ord("b"):
                raise KeyError("a bug")
            return Finish(stop.reason)

        def on_child(self, parent, ended, running):
            return Wait()

    engine = scripted_engine(Transcripts(tokenizer, {"": "yes"}), tokenizer)
    with pytest.raises(GenerateError, match="1 of 3 requests failed, the first is number 1: KeyError: 'a bug'") as info:
        engine.generate(["a", "b", "c"], Fails())
    outputs, errors = info.value.outputs, info.value.errors
    assert [out.finish_reason for out in outputs] == ["eos", "error", "eos"]
    assert [out.text for out in outputs] == ["yes"] * 3
    assert list(errors) == [1] and info.value.__cause__ is errors[1]
    assert_all_pages_free(engine)


def test_a_spawn_beyond_the_familys_bound_degrades():
    tokenizer = byte_tokenizer()
    engine = scripted_engine(Transcripts(tokenizer, {"": "no"}), tokenizer, max_family_pages=6)

    class Refused(Sampler):
        def on_refused(self, thread, reason):
            return Append(sampling=LONG)

    out = engine.generate("P", Refused(2, None, Spawn, [[1] * 20, [2] * 20]), sampling=LONG)
    assert out.text == "no" and out.finish_reason == "eos"
    assert out.degraded == ["thread 0: fork refused: 11 pages needed, 6 available in the family's bound"]
    assert_all_pages_free(engine)
