"""Grammars of other shapes than Multiverse's: tags of several tokens, no plan, marked conclusions."""

import dataclasses

import pytest
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.reasoning.grammar import Grammar, GrammarProgram
from apr_jax.reasoning.grammars.multiverse import MULTIVERSE
from apr_jax.testing import byte_tokenizer
from apr_jax.tokenizers import ByteTokenizer
from apr_jax.types import SamplingParams

LONG = SamplingParams(max_new_tokens=400)
PLAN = "<Parallel><Goal><Outline>1: add</Outline><Outline>2: multiply</Outline></Goal>"


def run(grammar: Grammar, texts: dict[str, str], tokenizer=None, *, sampling=LONG):
    tokenizer = tokenizer or byte_tokenizer()
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer)
    out = engine.generate("Q", program=GrammarProgram(grammar, tokenizer), sampling=sampling)
    assert_all_pages_free(engine)
    return out


def test_tags_of_several_tokens_stop_by_string():
    texts = {"": PLAN + " both</Conclusion></Parallel> 7", "0.0": " a</Path>lost", "0.1": " b</Path>lost"}
    out = run(MULTIVERSE, texts, ByteTokenizer())
    assert out.text == f"{PLAN}<Path>1: a</Path><Path>2: b</Path><Conclusion> both</Conclusion></Parallel> 7"
    assert out.answer == "7"
    assert out.degraded == []
    inside = len(out.text) - len(" 7")
    assert out.metrics.parallel_ratio == pytest.approx(inside / out.metrics.total_tokens)


def test_a_grammar_without_plan_forks_a_fixed_number():
    grammar = Grammar(
        name="pairs",
        block=("<Parallel>", "</Parallel>"),
        plan="",
        trigger="<Parallel>",
        outline=None,
        num_paths=2,
        header="<Path>",
        closer="</Path>",
        after_join="<Conclusion>",
        join="prefill",
        nested=False,
    )
    texts = {"": "so <Parallel> end", "0.0": "x <Parallel> y</Path>", "0.1": "z</Path>"}
    out = run(grammar, texts)
    assert out.text == "so <Parallel><Path>x <Parallel> y</Path><Path>z</Path><Conclusion> end"
    assert out.degraded == []  # a trigger in a child of a flat grammar is plain text
    assert out.metrics.reprefill_tokens == len(out.threads[2].token_ids)


def test_marked_conclusions_are_all_that_the_parent_keeps():
    grammar = dataclasses.replace(MULTIVERSE, join="conclusion", conclusion_marker="=>", name="concluding")
    tokenizer = byte_tokenizer()
    texts = {"": PLAN + " end</Conclusion>", "0.0": " long search =>7]</Path>", "0.1": " no mark</Path>"}
    contexts = []
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer)

    def listen(event):
        if type(event).__name__ == "JoinEvent":
            family = engine.scheduler.families[event.family_id]
            segments = family.root.context.segments
            contexts.append(tokenizer.decode([i for s in segments for i in s.token_ids]))

    engine.listeners.append(listen)
    out = engine.generate("Q", program=GrammarProgram(grammar, tokenizer), sampling=LONG)
    assert contexts == [f"Q{PLAN}7]</Path><Path>2: no mark</Path>"]
    assert out.text == (f"{PLAN}<Path>1: long search =>7]</Path><Path>2: no mark</Path><Conclusion> end</Conclusion>")
    assert out.degraded == ["thread 0: child 2 has no conclusion and is joined whole"]
    assert_all_pages_free(engine)


def test_sampling_inside_children_may_differ():
    seen = {}
    tokenizer = byte_tokenizer()
    texts = {"": PLAN + " end", "0.0": "x</Path>", "0.1": "y</Path>"}
    said = Transcripts(tokenizer, texts)

    def script(thread, ids):
        seen[thread.path] = thread.sampling
        return said(thread, ids)

    grammar = dataclasses.replace(MULTIVERSE, child_sampling={"repetition_penalty": 1.02})
    engine = scripted_engine(script, tokenizer)
    engine.generate("Q", program=GrammarProgram(grammar, tokenizer), sampling=LONG)
    assert seen[()].repetition_penalty == 1.0
    assert seen[((0, 0),)].repetition_penalty == seen[((0, 1),)].repetition_penalty == 1.02


def test_an_own_stop_string_ends_the_root():
    out = run(MULTIVERSE, {"": "abc STOP def"}, sampling=SamplingParams(stop=("STOP",)))
    assert out.text == "abc STOP"
    assert out.finish_reason == "stop_string"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"join": "splice"}, "join is 'splice'"),
        ({"closer": ""}, "closer of grammar 'multiverse' is empty"),
        ({"outline": None}, "either outline or num_paths"),
    ],
)
def test_a_grammar_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MULTIVERSE, **changes)
