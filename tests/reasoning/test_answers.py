"""What programs answer is carried out, within guards and bounds; what cannot be done degrades."""

import dataclasses

import pytest
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.engine import events
from apr_jax.reasoning.grammar import GrammarProgram
from apr_jax.reasoning.grammars.multiverse import MULTIVERSE
from apr_jax.reasoning.program import (
    Append,
    Cancel,
    Finish,
    Fork,
    Join,
    Keep,
    Program,
    Spawn,
    Wait,
)
from apr_jax.testing import byte_tokenizer
from apr_jax.types import SamplingParams

PLAN = "<Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
LONG = SamplingParams(max_new_tokens=300)


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


def test_children_with_too_many_stops_degrade():
    tokenizer = byte_tokenizer()
    grammar = dataclasses.replace(MULTIVERSE, join="conclusion", conclusion_marker="</Conclusion>")
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
