"""Models that babble: whatever they say, every request ends, with a reason for what went wrong, and holds no
page.
"""

import hashlib

import pytest
from transcripts import assert_all_pages_free, grammar_tokenizer, path_name, scripted_engine

from apr_jax.reasoning.deciding import Deadline, Quorum, first
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.grammar import Grammar
from apr_jax.reasoning.grammars.apr import CALLING, END_CALLING, END_RESULTS, RESULTS
from apr_jax.reasoning.program import Guards, Request
from apr_jax.reasoning.programs import GRAMMARS, STRATEGIES, make_program
from apr_jax.reasoning.strategies.options import StrategyOptions, ThoughtOptions
from apr_jax.testing import tiny_config
from apr_jax.tokenizers import ByteTokenizer
from apr_jax.types import SamplingParams

REASONS = ("eos", "length", "context", "pages", "stop_id", "stop_string", "unclosed", "wall_clock")
WHENS = (None, first(), Quorum(count=2), Deadline(20), first(arrival=True))


def pieces_of(grammar: Grammar) -> tuple[list[str], list[str]]:
    """A grammar's tags, and whole plans: sound, repeated, without labels, torn."""
    name = "plan" if grammar.name == "npr" else "Outline"
    tags = [*grammar.block, grammar.plan, grammar.trigger, f"<{name}>", f"</{name}>", "<Path>", "<step>"]
    tags += [grammar.closer, grammar.closer, grammar.after_join, grammar.header, " =>"]
    opened, closed = grammar.plan, grammar.trigger
    plans = [
        f"{opened}<{name}>1: a</{name}><{name}>2: b</{name}>{closed}",
        f"{opened}<{name}>1:</{name}><{name}>1:</{name}><{name}>2.1:</{name}>{closed}",
        f"{opened}<{name}></{name}><{name}>: b</{name}>{closed}",
        f"</{name}>{closed}",
        f"{opened}<{name}>...:{closed}",
        f"{opened}{opened}{closed}{closed}",
        f"{closed}{grammar.closer}{grammar.block[1]}",
    ]
    return [tag for tag in tags if tag], plans


def babble(tokenizer, pieces: tuple[list[str], list[str]], seed: int):
    """A script of tags, plans and letters in any order; depends on the seed, the prompt and the thread's path alone."""
    tags, plans = ([tokenizer.encode(piece) for piece in group] for group in pieces)

    def script(thread, ids):
        """Says what is left of the piece that it is in, else draws the next piece."""
        at, n = 0, thread.num_sampled + len(ids) - len(thread.token_ids)
        for draw in range(10_000):
            drawn_from = repr((seed, thread.family.root.prompt_ids, thread.path, draw)).encode()
            digest = hashlib.blake2b(drawn_from, digest_size=8).digest()
            kind, pick = digest[0] % 16, digest[1]
            if kind < 3:
                said = plans[pick % len(plans)]
            elif kind < 8:
                said = tags[pick % len(tags)]
            elif kind == 8 and pick < 60:
                said = [tokenizer.eos_ids[0]]
            else:
                said = [97 + pick % 26]
            if n < at + len(said):
                return said[n - at]
            at += len(said)
        raise AssertionError("unreachable")

    return script


def engine_for(script, tokenizer, max_position=300, **fields):
    return scripted_engine(
        script,
        tokenizer,
        model_config=tiny_config(vocab_size=tokenizer.vocab_size, max_position=max_position),
        **{"page_size": 8, "max_threads": 8, "steps_per_dispatch": 4, **fields},
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("one_token_tags", [True, False])
@pytest.mark.parametrize("num_pages", [512, 24])
@pytest.mark.parametrize("name", list(GRAMMARS))
def test_babbling_ends_and_leaks_nothing(name, seed, one_token_tags, num_pages):
    grammar = GRAMMARS[name]
    tokenizer = grammar_tokenizer(grammar) if one_token_tags else ByteTokenizer()
    engine = engine_for(babble(tokenizer, pieces_of(grammar), seed), tokenizer, num_pages=num_pages)
    sampling = SamplingParams(max_new_tokens=[40, 100, 290][seed % 3], stop=((), ("zq",))[seed % 2])
    bounds = {"max_thread_tokens": [None, 60][seed % 2], "max_width": [None, 2, 1][seed // 2 % 3]}
    guards = Guards(max_depth=3, max_fan_out=4, max_family_tokens=1500, **bounds)
    join = [None, "stitch", "prefill", "conclusion"][seed % 4]
    program = make_program(name, tokenizer, join)
    outs = engine.generate([f"Prompt {i}" for i in range(4)], program, sampling=sampling, guards=guards)
    assert_all_pages_free(engine)
    for out in outs:
        assert out.metrics.total_tokens <= 1500
        assert out.metrics.critical_path_tokens <= sampling.max_new_tokens
        assert out.finish_reason in REASONS
        assert tokenizer.decode(out.text_ids).startswith(out.text)
        assert_explained(out, grammar)


def assert_explained(out, grammar: Grammar) -> None:
    """Whatever is not as the format wants has a reason. What a decision dropped is cut anywhere."""
    reasons = "\n".join(out.degraded)
    dropped: set[int] = set()
    for thread in out.threads[1:]:
        if thread.status == "cancelled" or thread.parent in dropped:
            dropped.add(thread.id)
        if thread.id not in dropped:
            assert thread.text.startswith(grammar.header[: grammar.header.find("{")]), thread
            assert thread.text.endswith(grammar.closer), thread
        inside = thread.text.removeprefix(grammar.header[: grammar.header.find("{")])
        if not grammar.nested and thread.id not in dropped and grammar.trigger in inside:
            assert f"thread {thread.id}: {grammar.trigger} inside a thread is text" in reasons
    if out.finish_reason == "unclosed":
        assert f"ended without {grammar.closer}" in reasons


APR_PROMPT = "Moving to Node #0\nCurrent State: 9:[1, 2, 3], Operations: []\n"
APR_TAGS = [CALLING, CALLING, RESULTS, END_CALLING, END_CALLING, END_RESULTS]
APR_LINES = [
    "Generated Node #0,0: 9:[3, 3] Operation: 1+2=3\n",
    "Generated Node #0,1: 9:[2, 4] Operation: 1+3=4\nGenerated Node #4,1: 9:[2, 4] Operation: 1+3=4\n",
    "Moving to Node #0,0\nCurrent State: 9:[3, 3], Operations: ['1+2=3']\n",
    "\n<Start Sub Search 0 at level 1> Moving to Node #0,0\n",
    "\n<Start Sub Search 0 at level 1> Moving to Node #0,0\n<Start Sub Search 1 at level 1> Moving to Node #0,1\n",
    "\n<Start Sub Search 0 at level 1> Moving to Node #9\n<Start Sub Search",
    "9,9 equal: Goal Reached\npath: Goal Reached\n",
    f"Moving to Node #0,1{END_CALLING}",
    f"\n<Start Sub Search 0 at level 1> Moving to Node #0\n{END_CALLING}",
    f"{CALLING}\n<Start Sub Search 0 at level 1> Moving to Node #0\n{END_CALLING}",
]


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("one_token_tags", [True, False])
@pytest.mark.parametrize("num_pages", [512, 60])
@pytest.mark.parametrize("max_tail_pages", [1, 32])
def test_babbling_searches_end_and_leak_nothing(seed, one_token_tags, num_pages, max_tail_pages):
    tokenizer = ByteTokenizer(tuple(dict.fromkeys(APR_TAGS)) if one_token_tags else ())
    script = babble(tokenizer, (APR_TAGS, APR_LINES), seed)
    engine = engine_for(script, tokenizer, 450, num_pages=num_pages, max_tail_pages=max_tail_pages)
    sampling = SamplingParams(max_new_tokens=[60, 200, 380][seed % 3], stop=((), ("zq",))[seed % 2])
    guards = Guards(
        max_depth=2 - (seed % 5 == 0),
        max_fan_out=1 + seed % 2,
        max_family_tokens=1500,
        max_width=[None, 1][seed // 2 % 2],
    )
    prompts = [f"{'x' * i}{APR_PROMPT}" for i in range(3)] + ["no state"]
    outs = engine.generate(prompts, "apr", sampling=sampling, guards=guards)
    assert_all_pages_free(engine)
    for out in outs:
        assert out.metrics.total_tokens <= 1500
        assert out.metrics.critical_path_tokens <= sampling.max_new_tokens
        assert out.finish_reason in REASONS
        assert CALLING not in out.text or out.degraded
        for thread in out.threads[1:]:
            assert thread.start_position == 0 or thread.text.endswith(f"{END_CALLING}\n") or out.degraded


# Everything else that a request may ask for, drawn by the seed: bounds, when joins happen, how much may fork.


def serve(engine, program, prompts, seed, **fields):
    """Outputs of requests side by side, on a clock that goes a second a step."""
    guards = Guards(
        max_depth=3,
        max_fan_out=4,
        max_family_tokens=1500,
        max_family_pages=[None, 40, 25][seed % 3],
        max_width=[None, 1, None, 2][seed % 4],
        max_wall_s=[None, 6.0, 25.0][seed // 3 % 3],
    )
    parallelism = ("auto", "off", "on", "auto")[seed // 2 % 4]
    sampling = SamplingParams(max_new_tokens=[60, 250][seed % 2])
    with Driver(engine, lambda: float(engine.stats.num_steps)) as driver:
        requests = [
            Request(token_ids=engine.encode_prompt(p), sampling=sampling, guards=guards, parallelism=parallelism)
            for p in prompts
        ]
        runs = [driver.submit(request, program) for request in requests]
        driver.run()
    assert_all_pages_free(engine)
    for run in runs:
        if run.error is not None:
            raise run.error
        out = engine.collect(run)
        assert out.metrics.total_tokens <= 1500 and out.metrics.critical_path_tokens <= sampling.max_new_tokens
        assert out.metrics.peak_pages <= (guards.max_family_pages or 512)
        assert out.finish_reason in (*REASONS, "steps")
        assert len(out.threads) == 1 or parallelism != "off"
        is_late = any("max_wall_s" in line for line in out.degraded)
        assert is_late is (out.finish_reason == "wall_clock")
        assert guards.max_wall_s is None or out.metrics.wall_s <= guards.max_wall_s + 1.0
        yield out


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("one_token_tags", [True, False])
@pytest.mark.parametrize("name", [*GRAMMARS, "apr"])
def test_babbling_under_any_condition_ends_with_its_reasons(name, one_token_tags, seed):
    is_apr = name == "apr"
    pieces = (APR_TAGS, APR_LINES) if is_apr else pieces_of(GRAMMARS[name])
    several = ByteTokenizer()
    tokenizer = several if not one_token_tags else ByteTokenizer(tuple(dict.fromkeys(APR_TAGS)))
    if one_token_tags and not is_apr:
        tokenizer = grammar_tokenizer(GRAMMARS[name])
    engine = engine_for(babble(tokenizer, pieces, seed), tokenizer, 450, num_pages=[512, 90][seed % 2])
    join = None if is_apr else (None, "stitch", "prefill", "conclusion")[seed // 5 % 4]
    program = make_program(name, tokenizer, join, WHENS[seed % 5])
    for out in serve(engine, program, [APR_PROMPT if is_apr else "Prompt"] * 4, seed):
        if not is_apr:
            assert_explained(out, GRAMMARS[name])


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_strategies_over_babble_end_and_leak_nothing(name, seed):
    tokenizer = ByteTokenizer()
    texts = (["\n", "\n", "1. one\n", "2", "sure", " "], ["1. a\n2. b\n", "impossible", "\n\n\n"])
    engine = engine_for(babble(tokenizer, texts, seed), tokenizer, num_pages=[512, 60][seed % 2])
    thoughts = ThoughtOptions(
        generate=("sample", "propose")[seed % 2],
        evaluate=("score", "value", "vote")[seed % 3],
        search=("breadth_first", "depth_first", "beam")[seed // 2 % 3],
        max_states=6,
    )
    accept = [None, lambda prompt, text: "q" in text][seed // 4 % 2]
    options = StrategyOptions(num_samples=4, max_steps=3, score=len, accept=accept, thoughts=thoughts)
    list(serve(engine, make_program(name, tokenizer, options=options), ["Prompt"] * 3, seed))


# One stream a way to go wrong: what each thread says by its path, and the reason that must be recorded.
ADVERSARIAL = {
    "a thread that never closes": ({"": "{plan}end", "0.0": "x" * 999}, "ended without {closer} (length)"),
    "a fork without outlines": ({"": "{opened}none{trigger}end"}, "{trigger} without outlines: no fork"),
    "a fork without its plan": ({"": "none{trigger}end"}, "{trigger} without {opened}"),
    "an end inside a thread": ({"": "{plan}end", "0.0": "x"}, "ended without {closer} (eos)"),
    "a stop inside a thread": ({"": "{plan}end", "0.0": "x##y{closer}"}, "ended without {closer} (stop_string)"),
    "a closer outside": ({"": "x{closer}end"}, "{closer} outside of a thread"),
    "a block in a thread": ({"": "{plan}end", "0.0": "x{plan}y{closer}"}, "inside a thread is text"),
    "an outline twice": ({"": "{twice}end", "0.0": "{closer}"}, "outline 1 is there twice: dropped"),
    "an outline without label": ({"": "{empty}end", "0.0": "{closer}"}, "an outline without label: dropped"),
    "triggers without end": ({"": "{trigger}" * 999}, "without outlines"),
    "blocks without end": ({"": "{plan}" * 99}, "fork refused"),
    "blocks all the way down": ({"*": "{plan}" * 99}, "fork refused"),
    "closers without end": ({"*": "{closer}" * 999}, "outside of a thread"),
}


def fits(case: str, grammar: Grammar) -> bool:
    """Whether a grammar can go wrong in this way at all."""
    if case in ("a block in a thread", "blocks all the way down"):
        return grammar.nested is (case == "blocks all the way down")
    reason = ADVERSARIAL[case][1]
    return grammar.outline is not None or not ("outline" in reason or "{opened}" in reason)


CASES = [(name, case) for name, grammar in GRAMMARS.items() for case in ADVERSARIAL if fits(case, grammar)]


@pytest.mark.parametrize("one_token_tags", [True, False])
@pytest.mark.parametrize("name, case", CASES)
def test_each_way_to_go_wrong_has_its_reason(name, case, one_token_tags):
    grammar = GRAMMARS[name]
    tokenizer = grammar_tokenizer(grammar) if one_token_tags else ByteTokenizer()
    texts, reason = ADVERSARIAL[case]
    one = "<plan>{}</plan>" if name == "npr" else "<Outline>{}</Outline>"
    words = {"opened": grammar.plan, "trigger": grammar.trigger, "closer": grammar.closer}
    for word, outlines in (("plan", ["1: a"]), ("twice", ["1: a", "1: b"]), ("empty", ["", "1: a"])):
        words[word] = grammar.plan + "".join(map(one.format, outlines)) + grammar.trigger
    if grammar.outline is None:
        words["plan"] = grammar.trigger
    said = {path: tokenizer.encode(text.format(**words)) for path, text in texts.items()}

    def script(thread, ids):
        line = said.get(path_name(thread), said.get("*", tokenizer.encode(grammar.closer)))
        n = thread.num_sampled + len(ids) - len(thread.token_ids)
        return line[n] if n < len(line) else tokenizer.eos_ids[0]

    engine = engine_for(script, tokenizer, num_pages=512)
    sampling = SamplingParams(max_new_tokens=250, stop=("##",))
    program, guards = make_program(name, tokenizer), Guards(max_depth=3, max_rounds=3)
    out = engine.generate("Q", program, sampling=sampling, guards=guards)
    assert_all_pages_free(engine)
    assert out.metrics.critical_path_tokens <= 250
    assert any(reason.format(**words) in line for line in out.degraded), out.degraded
    assert_explained(out, grammar)
