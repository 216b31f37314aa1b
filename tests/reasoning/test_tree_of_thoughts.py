"""Trees of thoughts whose values, votes and order of search are written down."""

import re

import pytest
from transcripts import assert_all_pages_free, scripted_engine

from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.program import Guards, Request
from apr_jax.reasoning.strategies.options import StrategyOptions, ThoughtOptions
from apr_jax.reasoning.strategies.tree_of_thoughts import TreeOfThoughts, read_value
from apr_jax.reasoning.text import chain_ids
from apr_jax.testing import byte_tokenizer
from apr_jax.types import SamplingParams

LONG = SamplingParams(max_new_tokens=600)
TOKENIZER = byte_tokenizer()
VALUES = {"a\n": 3, "b\n": 5, "c\n": 1, "a\na\n": 9, "a\nb\n": 2, "b\na\n": 4, "b\nb\n": 6, "b\nc\n": 0.5}


class Speaker:
    """Says thoughts by ordinal, values by what it is shown, and votes for the choice that VALUES has most for."""

    def __init__(self, values=VALUES):
        self.values = values
        self.asked = []

    def __call__(self, thread, ids):
        text = TOKENIZER.decode(chain_ids(thread.parent) if thread.parent else []) + TOKENIZER.decode(ids)
        prompt = TOKENIZER.decode(thread.prompt_ids)
        sampled = ids[sum(not s for s in thread.sampled) :]
        said = TOKENIZER.encode(self.say(thread, text, prompt, len(sampled)))
        return said[len(sampled)] if len(sampled) < len(said) else TOKENIZER.eos_ids[0]

    def say(self, thread, text, prompt, num_sampled):
        if "best:" in prompt:
            choices = [c.strip() + "\n" for c in re.split(r"Choice \d+:\n", prompt.partition("best:")[0])[1:]]
            best = max(choices, key=lambda c: self.values.get(c, 0))
            if not num_sampled:
                self.asked.append(choices)
            return f"{choices.index(best) + 1}!"
        if "value:" in text:
            state = text.partition("value:")[0]
            if not num_sampled:
                self.asked.append(state)
            return f" {self.values.get(state, 0)}\n"
        if "next:" in text:
            return "a\nb\n\nb\nc\nd\n"
        if "answer:" in text:
            return "42"
        return "abcdefgh"[thread.path[-1][1] if thread.path else 0] + "\n"


def run(speaker=None, *, num_samples=3, beam_width=1, max_steps=2, accept=None, load=None, **thoughts):
    options = StrategyOptions(
        num_samples=num_samples,
        beam_width=beam_width,
        max_steps=max_steps,
        accept=accept,
        thoughts=ThoughtOptions(value_prompt="value:", propose_prompt="next:", vote_prompt="best:", **thoughts),
    )
    engine = scripted_engine(speaker or Speaker(), **(load or {}))
    out = engine.generate("P", TreeOfThoughts(TOKENIZER, options), sampling=LONG)
    assert_all_pages_free(engine)
    return out


def test_values_are_asked_of_every_state_and_the_beam_follows_the_best():
    speaker = Speaker()
    out = run(speaker)
    assert out.text == "b\nb\n" and not out.degraded
    assert sorted(speaker.asked) == ["a\n", "b\n", "b\na\n", "b\nb\n", "b\nc\n", "c\n"]
    wider = run(beam_width=2)
    assert wider.text == "a\na\n"  # 9 is below a, which is second at first


@pytest.mark.parametrize("load", [{"steps_per_dispatch": 1, "max_threads": 1}, {"num_pages": 48, "max_threads": 4}])
def test_the_outcome_does_not_depend_on_load(load):
    for fields in ({"beam_width": 2}, {"generate": "propose", "beam_width": 2}, {"search": "depth_first"}):
        here, there = run(**fields), run(load=load, **fields)
        assert here.text == there.text and here.metrics.total_tokens == there.metrics.total_tokens


def test_breadth_first_goes_on_with_all_states_over_the_threshold():
    speaker = Speaker()
    out = run(speaker, search="breadth_first", threshold=2.5)
    assert out.text == "a\na\n"
    assert {state for state in speaker.asked if state.count("\n") == 1} == {"a\n", "b\n", "c\n"}
    assert {state[0] for state in speaker.asked if state.count("\n") == 2} == {"a", "b"}


def test_depth_first_goes_back_where_nothing_is_worth_it():
    speaker = Speaker()
    out = run(speaker, search="depth_first", threshold=8.0, num_samples=2)
    assert speaker.asked[:2] == ["a\n", "b\n"] and len(speaker.asked) == 2  # nothing is: the best of what there is
    assert out.text == "b\n"
    speaker = Speaker({**VALUES, "a\n": 8, "b\n": 9})
    out = run(speaker, search="depth_first", threshold=8.0, num_samples=2)
    assert speaker.asked == ["a\n", "b\n", "b\na\n", "b\nb\n", "a\na\n", "a\nb\n"]
    assert out.text == "a\na\n"


def test_depth_first_expands_no_more_states_than_it_may():
    values = {**VALUES, "a\n": 8, "b\n": 9}
    speaker = Speaker(values)
    out = run(speaker, search="depth_first", threshold=8.0, num_samples=2, max_states=1)
    assert speaker.asked == ["a\n", "b\n", "b\na\n", "b\nb\n"] and out.text == "a\n"


def test_proposed_thoughts_become_states_once_each():
    speaker = Speaker()
    out = run(speaker, generate="propose", num_samples=4)
    assert out.text == "b\nb\n"
    assert sorted(speaker.asked[:4]) == ["a\n", "b\n", "c\n", "d\n"]
    assert out.threads[1].text == "next:a\nb\n\nb\nc\nd\n"
    assert [thread.text for thread in out.threads if thread.status == "finished"][1:] == ["b\n", "b\n"]


def test_votes_show_all_states_and_share_the_prompts_pages():
    speaker = Speaker()
    options = StrategyOptions(
        num_samples=3,
        beam_width=1,
        max_steps=2,
        thoughts=ThoughtOptions(evaluate="vote", vote_prompt="best:", num_evaluations=2),
    )
    engine = scripted_engine(speaker)
    with Driver(engine) as driver:
        prompt = TOKENIZER.encode("P" * 40)
        request = Request(token_ids=prompt, sampling=SamplingParams(max_new_tokens=60))
        root = driver.submit(request, TreeOfThoughts(TOKENIZER, options))
        driver.run()
    out = engine.collect(root)
    assert out.text == "b\nb\n" and not out.degraded
    assert speaker.asked == [["a\n", "b\n", "c\n"]] * 2 + [["b\na\n", "b\nb\n", "b\nc\n"]] * 2
    assert root.root.family.counters.cached_tokens >= 4 * 36
    assert_all_pages_free(engine)


def test_an_answer_may_follow_the_last_thought():
    out = run(answer_prompt="answer:")
    assert out.text == "b\nb\nanswer:42" and out.finish_reason == "eos"


def test_a_score_needs_no_helper_and_a_checker_ends_the_search():
    out = run(evaluate="score", accept=lambda prompt, text: text == "c\n")
    assert out.text == "c\n" and len(out.threads) == 4


def test_a_state_without_proposals_is_complete():
    class Silent(Speaker):
        def say(self, thread, text, prompt, num_sampled):
            if "next:" in text and "a\n" in text.partition("next:")[0]:
                return "\n"
            return super().say(thread, text, prompt, num_sampled)

    out = run(Silent({"a\n": 9}), generate="propose", max_steps=4)
    assert out.text == "a\n" and not out.degraded


@pytest.mark.parametrize("bound", [{"max_family_tokens": 40}, {"max_thread_tokens": 4}, {"max_family_tokens": 200}])
@pytest.mark.parametrize("generate", ["sample", "propose"])
@pytest.mark.parametrize("evaluate", ["value", "vote", "score"])
def test_what_exceeds_a_guard_still_ends(bound, generate, evaluate):
    options = StrategyOptions(
        num_samples=3,
        max_steps=3,
        score=len,
        thoughts=ThoughtOptions(generate=generate, evaluate=evaluate, vote_prompt="best:", value_prompt="value:"),
    )
    engine = scripted_engine(Speaker(), num_pages=40, max_threads=3)
    outs = engine.generate(["P", "Q"], TreeOfThoughts(TOKENIZER, options), sampling=LONG, guards=Guards(**bound))
    for out in outs:
        assert out.finish_reason in ("eos", "length", "steps")
        assert out.metrics.total_tokens <= bound.get("max_family_tokens", 1000)
    assert_all_pages_free(engine)


def test_values_are_read_from_numbers_and_words():
    assert read_value("likely, no: 7.5") == 7.5 and read_value("Sure!") == 20 and read_value("hm") == 0
    assert read_value("unlikely") == 0 and read_value("I am unsure") == 0
    assert read_value("1 likely\nimpossible") == 0.001
