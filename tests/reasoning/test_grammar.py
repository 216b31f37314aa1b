"""Grammars of other shapes than Multiverse's: tags of several tokens, no plan, marked conclusions."""

import dataclasses

import pytest
from transcripts import Transcripts, assert_all_pages_free, grammar_tokenizer, scripted_engine

from apr_jax.reasoning.grammar import Grammar, GrammarProgram
from apr_jax.reasoning.grammars.multiverse import MULTIVERSE
from apr_jax.reasoning.programs import GRAMMARS, make_program
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
        trigger="<Parallel>",
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
    assert out.degraded == ["thread 1: <Parallel> inside a thread is text: pairs does not nest"]
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
        ({"name": ""}, "name is '', must not be empty"),
        ({"join": "splice"}, "join is 'splice', must be one of stitch, prefill, conclusion"),
        ({"block": ("<Parallel>", "")}, "block is .* must be an opening and a closing tag"),
        ({"closer": ""}, "closer is '', must not be empty"),
        ({"closer": "</Goal>"}, "trigger is '</Goal>', is part of the closer '</Goal>'"),
        ({"closer": "</Goal>>"}, "trigger is '</Goal>', is part of the closer '</Goal>>'"),
        ({"conclusion_marker": ""}, "conclusion_marker is '', must not be empty"),
        ({"conclusion_marker": "</Path>"}, "closer is '</Path>', is part of the conclusion_marker"),
        ({"header": "<Path>{label}: {number}"}, "header is .* may name {label} only"),
        ({"header": "<Path>{"}, "header is '<Path>{'"),
        ({"header": "<Path></Path>"}, "header is .* holds the closer '</Path>'"),
        ({"before_fork": "</Goal>"}, "before_fork is '</Goal>', holds the trigger"),
        ({"outline": None}, "num_paths is 0, with outline = None: either one"),
        ({"num_paths": 2}, "num_paths is 2, with outline"),
        ({"outline": None, "num_paths": 2}, "plan is '<Goal>', though there is no outline"),
        ({"plan": ""}, "plan is '', must not be empty"),
        ({"outline": "("}, "outline is '\\(', no pattern"),
        ({"outline": "<Outline>[0-9]+:"}, "outline is .* has 0 groups, must have 1"),
        ({"outline": "(a)(b)"}, "outline is .* has 2 groups, must have 1"),
        ({"max_children": 0}, "max_children is 0, must be >= 1"),
        ({"max_depth": 2, "nested": False}, "max_depth is 2, though nested is false"),
        ({"without_outlines": "wait"}, "without_outlines is 'wait', must be one of continue, stop"),
        ({"unclosed": "stop"}, "unclosed is 'stop', though nested is true"),
        ({"child_sampling": {"seed": 1}}, "child_sampling sets seed, may set temperature"),
        ({"child_sampling": {"temperature": -1.0}}, "temperature is -1.0"),
    ],
)
def test_a_grammar_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MULTIVERSE, **changes)


def test_bounds_of_a_grammar_drop_outlines_and_refuse_forks():
    plan = "<Goal><Outline>none</Outline><Outline>1: a</Outline><Outline>2: b</Outline><Outline>3: c</Outline></Goal>"
    grammar = dataclasses.replace(MULTIVERSE, max_children=2, max_rounds=1, max_depth=1, max_child_tokens=40)
    out = run(grammar, {"": f"{plan} again {plan} end", "0.0": f"{plan} so", "0.1": "b" * 50})
    assert out.text == f"{plan}<Path>1:{plan} so</Path><Path>2:{'b' * 40}</Path><Conclusion> again {plan} end"
    assert [line.removeprefix("thread ") for line in out.degraded] == [
        "0: an outline without label: dropped",
        "0: outline 3 is beyond max_children = 2: dropped",
        "1: an outline without label: dropped",
        "1: outline 3 is beyond max_children = 2: dropped",
        "1: fork refused: depth 2 is beyond multiverse's max_depth = 1",
        "1: ended without </Path> (eos)",
        "2: ended without </Path> (length)",
        "0: an outline without label: dropped",
        "0: outline 3 is beyond max_children = 2: dropped",
        "0: fork refused: it would be fork 2 of its thread, multiverse has 1",
    ]


@pytest.mark.parametrize("join", ["stitch", "prefill", "conclusion"])
@pytest.mark.parametrize("one_token_tags", [True, False])
@pytest.mark.parametrize("name", list(GRAMMARS))
def test_any_grammar_runs_under_any_join(name, join, one_token_tags):
    grammar = GRAMMARS[name]
    tokenizer = grammar_tokenizer(grammar) if one_token_tags else ByteTokenizer()
    plan = {"npr": "<guideline><plan>1: a</plan><plan>2: b</plan></guideline>", "parallel_r1": "<Parallel>"}.get(
        name, f"{grammar.plan}<Outline>1: a</Outline><Outline>2: b</Outline>{grammar.trigger}"
    )
    texts = {"": f"so {plan}!{grammar.block[1]} 7", "0.0": f" one =>x{grammar.closer}", "0.1": f"two{grammar.closer}"}
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer)
    said = engine.generate("Q", make_program(name, tokenizer, join), sampling=LONG)
    own = engine.generate("Q", make_program(name, tokenizer), sampling=LONG)
    assert said.text == own.text and said.answer == "7"
    assert said.threads[1].text.endswith(f" one =>x{grammar.closer}")
    again = len(said.threads[2].token_ids) if join == "prefill" else 0
    assert said.metrics.reprefill_tokens == again
    unmarked = ["2"] if join == "conclusion" else []
    assert said.degraded == [f"thread 0: child {i} has no conclusion and is joined whole" for i in unmarked]
    assert own.degraded == []
    assert_all_pages_free(engine)
