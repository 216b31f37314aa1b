"""Every bound of a request under every program: it ends in text, within the bound, with a reason."""

import pytest
import test_apr
import test_npr
import test_threadweaver
from test_join_oracle import FLAT_TEXTS, ONE, SEVERAL
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.engine.thread import Status
from apr_jax.reasoning.deciding import first
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.program import Append, Guards, Request
from apr_jax.reasoning.programs import GRAMMARS, STRATEGIES, make_program
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.testing import tiny_config
from apr_jax.types import SamplingParams

MV_PLAN = "<Parallel><Goal><Outline>1: add</Outline><Outline>2: multiply</Outline></Goal>"
TEXTS = {
    "multiverse": {"": f"so {MV_PLAN} and {MV_PLAN} 7", "0.0": f" x {MV_PLAN} y</Path>", "0.1": " longer path</Path>"},
    "npr": {"": f"{test_npr.PLAN} and {test_npr.PLAN} 7", "0.0": f" x {test_npr.PLAN} y</step>", "0.1": " z</step>"},
    "threadweaver": {"": f"{test_threadweaver.PLAN} and {test_threadweaver.PLAN} 7"},
    "parallel_r1": FLAT_TEXTS,
    "apr": test_apr.TEXTS | {"": test_apr.BEFORE + "<Calling Sub Searches>and<Sub Searches>7", "1.0": test_apr.CALLS},
}
CLOSERS = {name: grammar.closer for name, grammar in GRAMMARS.items()} | {"apr": "<End Calling Sub Searches>"}
TOKENIZERS = pytest.mark.parametrize("tokenizer", [ONE, SEVERAL], ids=["one token", "several"])
PROGRAMS = pytest.mark.parametrize("name", list(TEXTS))
LONG = SamplingParams(max_new_tokens=2000)


class Talkative(Transcripts):
    """Threads that are not written down say something and end as the format wants."""

    def __init__(self, name, tokenizer):
        super().__init__(tokenizer, TEXTS[name])
        self.other = tokenizer.encode(f" well{CLOSERS[name]}")

    def __call__(self, thread, ids):
        name = "/".join(f"{fork}.{ordinal}" for fork, ordinal in thread.path)
        self.ids.setdefault(name, self.other)
        return super().__call__(thread, ids)


def engine_for(name, tokenizer, **fields):
    model = tiny_config(vocab_size=tokenizer.vocab_size, max_position=4096)
    fields = {"num_pages": 2048, "steps_per_dispatch": 8} | fields
    return scripted_engine(Talkative(name, tokenizer), tokenizer, model_config=model, **fields)


def run(name, tokenizer, guards, sampling=LONG, **fields):
    engine = engine_for(name, tokenizer, **fields)
    prompt = test_apr.PROMPT if name == "apr" else "Q"
    out = engine.generate(prompt, name, sampling=sampling, guards=guards)
    assert_all_pages_free(engine)
    return out


def depth_of(out, thread):
    return 0 if thread.parent is None else 1 + depth_of(out, out.threads[thread.parent])


@PROGRAMS
@TOKENIZERS
def test_without_a_guard_they_nest_and_fork_twice(name, tokenizer):
    out = run(name, tokenizer, Guards())
    assert sum(thread.parent == 0 for thread in out.threads) == (2 if name == "apr" else 4)
    assert max(depth_of(out, thread) for thread in out.threads) == (1 if name in ("threadweaver", "parallel_r1") else 2)
    assert out.finish_reason == "eos"


BOUNDS = {
    "max_depth": (0, "fork refused: depth 1 is beyond max_depth = 0"),
    "max_fan_out": (1, "fork into 2 children cut to max_fan_out = 1"),
    "max_rounds": (1, "fork refused: it would be fork 2 of its thread, max_rounds is 1"),
    "max_thread_tokens": (20, None),
    "max_family_tokens": (60, None),
    "max_family_pages": (None, None),  # one less than it takes
}


@PROGRAMS
@TOKENIZERS
@pytest.mark.parametrize("bound", list(BOUNDS))
def test_each_bound_holds(name, tokenizer, bound):
    value, reason = BOUNDS[bound]
    if value is None:
        value = run(name, tokenizer, Guards()).metrics.peak_pages - 1
    guards = Guards(**{bound: value})
    out = run(name, tokenizer, guards)
    forks = [sum(thread.parent == parent for thread in out.threads) for parent in range(len(out.threads))]
    assert max(depth_of(out, thread) for thread in out.threads) <= guards.max_depth
    assert max(forks) <= 2 * guards.max_fan_out  # of two forks
    assert max(len(thread.token_ids) for thread in out.threads) <= (guards.max_thread_tokens or 2000)
    assert out.metrics.total_tokens <= guards.max_family_tokens
    assert out.metrics.peak_pages <= (guards.max_family_pages or 2048)
    assert out.text
    if reason is not None:
        assert any(reason in line for line in out.degraded), out.degraded
    else:
        assert out.degraded or out.finish_reason in ("length", "pages"), out


# The wall clock, which a test turns by hand.


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run_until_late(engine, program, prompt, late_after, sampling=LONG, guards=Guards(max_wall_s=5.0)):  # noqa: B008
    """Drives a request whose time is over after so many steps; no token may be sampled from there on."""
    clock = Clock()
    with Driver(engine, clock) as driver:
        run = driver.submit(Request(token_ids=engine.encode_prompt(prompt), sampling=sampling, guards=guards), program)
        for _ in range(late_after):
            driver.step()
        clock.now += 6.0
        dispatches = engine.stats.num_decode_dispatches
        driver.step()
        assert run.finish_reason is not None and not driver.active
        assert engine.stats.num_decode_dispatches <= dispatches + 1
        assert run.wall_s == (6.0 if run.finish_reason == "wall_clock" else run.wall_s)
    assert_all_pages_free(engine)
    return run


@PROGRAMS
@TOKENIZERS
@pytest.mark.parametrize("when", [None, first()], ids=["all", "first"])
def test_when_time_is_over_the_request_ends_in_text(name, tokenizer, when):
    whole = run(name, tokenizer, Guards()) if when is None else None
    late = joined = 0
    for steps in range(0, 200, 3):
        engine = engine_for(name, tokenizer, steps_per_dispatch=4)
        program = make_program(name, tokenizer, when=when)
        prompt = test_apr.PROMPT if name == "apr" else "Q"
        ended = run_until_late(engine, program, prompt, steps)
        out = engine.collect(ended)
        if ended.finish_reason != "wall_clock":
            assert out.finish_reason == "eos" and not out.degraded
            break
        late += 1
        assert "thread 0: max_wall_s = 5 is over" in out.degraded
        assert ended.root.status is Status.FINISHED
        joined += any(thread.status == "finished" for thread in out.threads[1:])
        if whole is not None and len(out.threads) == 1 and name != "apr":  # a call gives way to its results
            assert whole.text.startswith(out.text)
        for thread in out.threads[1:]:
            closed = name == "apr" or thread.text.endswith(CLOSERS[name])
            assert closed or thread.status == "cancelled", thread
    assert late > 3 and joined > 0


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_strategy_whose_time_is_over_chooses_from_what_there_is(name):
    texts = {"": "1. one\n2. two\n"}

    class Babble(Transcripts):
        def __call__(self, thread, ids):
            path = "/".join(f"{fork}.{ordinal}" for fork, ordinal in thread.path)
            self.ids.setdefault(path, ONE.encode(f"step {path}\n" * (1 + len(path) % 3)))
            return super().__call__(thread, ids)

    options = StrategyOptions(num_samples=4, max_steps=4, score=len)
    for steps in range(0, 60, 2):
        engine = scripted_engine(Babble(ONE, texts), ONE, steps_per_dispatch=2, num_pages=1024)
        program = make_program(name, ONE, options=options)
        ended = run_until_late(engine, program, "Q", steps)
        if ended.finish_reason != "wall_clock":
            break
        out = engine.collect(ended)
        assert "thread 0: max_wall_s = 5 is over" in out.degraded
        assert all(thread.status in ("finished", "cancelled") for thread in out.threads)
        if any(len(thread.token_ids) > 4 for thread in out.threads):
            assert out.text
    assert steps > 4


def test_a_program_that_goes_on_forcing_tokens_is_ended_all_the_same():
    engine = engine_for("multiverse", ONE)
    program = make_program("multiverse", ONE)
    on_stop = program.on_stop

    def stubborn(thread, stop):
        return Append([97]) if stop.reason == "wall_clock" else on_stop(thread, stop)

    program.on_stop = stubborn
    ended = run_until_late(engine, program, "Q", 14)
    assert ended.finish_reason == "wall_clock" and len(ended.root.family.threads) > 1


def test_other_requests_go_on():
    engine = engine_for("parallel_r1", ONE)
    clock = Clock()
    with Driver(engine, clock) as driver:
        program = make_program("parallel_r1", ONE)
        hasty, patient = (
            driver.submit(Request(token_ids=[1, i], sampling=LONG, guards=Guards(max_wall_s=limit)), program)
            for i, limit in enumerate((1.0, None))
        )
        driver.step()
        clock.now += 2.0
        driver.run()
    assert hasty.finish_reason == "wall_clock" and patient.finish_reason == "eos"
    assert_all_pages_free(engine)


@pytest.mark.parametrize("field, value", [("max_family_pages", 0), ("max_wall_s", 0.0), ("max_wall_s", float("inf"))])
def test_bounds_that_cannot_be_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, must be"):
        Guards(**{field: value})


def test_a_prompt_beyond_the_requests_pages_is_refused_with_both_numbers():
    engine = engine_for("multiverse", ONE)
    with pytest.raises(ValueError, match="the prompt needs 6 pages, a family may hold 3"):
        engine.generate([1] * 20, guards=Guards(max_family_pages=3))
    assert_all_pages_free(engine)
