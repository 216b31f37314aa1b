"""Metrics against a recount from the events alone: on random trees, and for every program."""

import pytest
from recount import Recount, assert_agrees
from test_fuzz import APR_LINES, APR_PROMPT, APR_TAGS, babble, engine_for, pieces_of
from transcripts import assert_all_pages_free, grammar_tokenizer, scripted_engine
from wild import say_anything, wild_program

from apr_jax.reasoning.deciding import Deadline, Quorum, first
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.program import Guards, Request
from apr_jax.reasoning.programs import GRAMMARS, STRATEGIES, make_program
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.testing import tiny_config
from apr_jax.tokenizers import ByteTokenizer
from apr_jax.types import SamplingParams


def run_and_recount(engine, requests):
    """Runs (request, program) pairs side by side; every one's metrics must be those of its recount."""
    engine.tells_contexts = True
    outs = []
    with Driver(engine) as driver:
        recounts = [Recount(i) for i in range(len(requests))]
        engine.listeners += recounts
        runs = [driver.submit(request, program) for request, program in requests]
        assert [run.root.family.id for run in runs] == [recount.family_id for recount in recounts]
        driver.run()
    for run, recount in zip(runs, recounts, strict=True):
        if run.error is not None:
            raise run.error
        outs.append(engine.collect(run))
        assert_agrees(recount, outs[-1].metrics, engine.tokenizer.decode, run.program.block)
    assert_all_pages_free(engine)
    return outs


ENGINES = [
    {},
    {"num_pages": 90, "max_threads": 3, "steps_per_dispatch": 4},
    {"num_pages": 60, "max_threads": 4, "steps_per_dispatch": 3, "max_tail_pages": 2},
    {"max_threads": 2, "steps_per_dispatch": 5, "max_family_pages": 25},
]


@pytest.mark.parametrize("group", [pytest.param(i, marks=pytest.mark.slow if i >= 4 else ()) for i in range(20)])
def test_random_trees(group):
    """50 trees a group, 10 at a time: forks, spawns, drops, marks, cancellations, preemption, all modes of joining."""
    engine_fields = {"page_size": 4, "steps_per_dispatch": 16} | ENGINES[group % len(ENGINES)]
    outs = []
    for start in range(50 * group, 50 * group + 50, 10):
        engine = scripted_engine(say_anything, model_config=tiny_config(max_position=400), **engine_fields)
        requests = []
        for seed in range(start, start + 10):
            sampling = SamplingParams(max_new_tokens=[30, 150, 390][seed % 3], seed=seed, stop_ids=(1,))
            prompt = [7] * (seed % 3 * 6) + [8 + seed % 9] * (1 + seed % 4)
            guards = Guards(max_family_tokens=800, max_rounds=4, max_width=[None, 2, None, 1][seed % 4])
            requests.append((Request(token_ids=prompt, sampling=sampling, guards=guards), wild_program(seed)))
        outs += run_and_recount(engine, requests)
    assert sum(out.metrics.num_threads for out in outs) > 200, "the trees are too small to show anything"


WHENS = [None, first(), Quorum(count=2), Deadline(9)]


@pytest.mark.parametrize("when", WHENS, ids=["all", "first", "quorum", "deadline"])
@pytest.mark.parametrize("name", list(GRAMMARS))
def test_grammars(name, when):
    """Nested where a format nests, under every join, tags of one token and of several, babbling all the time."""
    grammar = GRAMMARS[name]
    num_joins = 0
    for seed, join in enumerate([None, "stitch", "prefill", "conclusion"]):
        tokenizer = grammar_tokenizer(grammar) if seed % 2 else ByteTokenizer()
        script = babble(tokenizer, pieces_of(grammar), seed)
        engine = engine_for(script, tokenizer, num_pages=[512, 40][seed % 2])
        program = make_program(name, tokenizer, join, when)
        sampling = SamplingParams(max_new_tokens=290, stop=("zq",))
        guards = Guards(max_depth=3, max_fan_out=4, max_family_tokens=1500, max_width=[None, 2, None, 1][seed])
        requests = [Request(token_ids=[65, 66, 67 + i], sampling=sampling, guards=guards) for i in range(6)]
        outs = run_and_recount(engine, [(request, program) for request in requests])
        num_joins += sum(out.metrics.num_threads > 1 for out in outs)
    assert num_joins >= 4, "too few forks to show anything"


@pytest.mark.parametrize("when", WHENS[:2], ids=["all", "first"])
@pytest.mark.parametrize("max_tail_pages", [1, 32])
def test_searches_in_contexts_of_their_own(when, max_tail_pages):
    outs = []
    for seed in range(8):
        tokenizer = ByteTokenizer(tuple(dict.fromkeys(APR_TAGS)) if seed % 2 else ())
        script = babble(tokenizer, (APR_TAGS, APR_LINES), seed)
        engine = engine_for(script, tokenizer, 450, num_pages=[512, 60][seed % 2], max_tail_pages=max_tail_pages)
        request = Request(token_ids=tokenizer.encode(APR_PROMPT), sampling=SamplingParams(max_new_tokens=380))
        outs += run_and_recount(engine, [(request, make_program("apr", tokenizer, when=when))] * 3)
    assert sum(out.metrics.num_children for out in outs) > 10


@pytest.mark.parametrize("name", ["sequential", *STRATEGIES])
def test_strategies(name):
    pieces = (["\n", "\n\n", "1", "yes", "1. a\n2. b\n"], ["so 5", "\\boxed{7}", "score: 8", "2. x\n3. y\n"])
    outs = []
    for seed in range(4):
        tokenizer = ByteTokenizer()
        engine = engine_for(babble(tokenizer, pieces, seed), tokenizer, 400, num_pages=[512, 80][seed % 2])
        program = make_program(name, tokenizer, options=StrategyOptions(num_samples=6, beam_width=2))
        sampling, guards = SamplingParams(max_new_tokens=120, temperature=1.0), Guards(max_width=[None, 2, 1, 3][seed])
        requests = [Request(token_ids=[65, 66 + i], sampling=sampling, guards=guards) for i in range(3)]
        outs += run_and_recount(engine, [(request, program) for request in requests])
    assert name == "sequential" or any(out.metrics.num_threads > 1 for out in outs)


@pytest.mark.parametrize("parallelism", ["off", "auto"])
@pytest.mark.parametrize("one_token_tags", [True, False])
@pytest.mark.parametrize("name", [*GRAMMARS, "apr"])
def test_threads_that_are_turned_back_and_requests_that_run_out_of_time(name, one_token_tags, parallelism):
    """Where tags cross from one segment to the next as well."""
    pieces = (APR_TAGS, APR_LINES) if name == "apr" else pieces_of(GRAMMARS[name])
    tokenizer = ByteTokenizer(tuple(dict.fromkeys(APR_TAGS)) if one_token_tags else ())
    if one_token_tags and name != "apr":
        tokenizer = grammar_tokenizer(GRAMMARS[name])
    turned_back = 0
    for seed in range(6):
        engine = engine_for(babble(tokenizer, pieces, seed), tokenizer, 450, max_threads=3, max_tail_pages=1 + seed % 2)
        with_time, program = Guards(max_family_tokens=1500), make_program(name, tokenizer)
        guards = [with_time, with_time, Guards(max_family_tokens=1500, max_wall_s=1e-6)]
        prompt = engine.encode_prompt(APR_PROMPT if name == "apr" else "Prompt")
        outs = run_and_recount(
            engine,
            [
                (
                    Request(token_ids=prompt, sampling=SamplingParams(max_new_tokens=200), guards=g, parallelism=p),
                    program,
                )
                for g, p in zip(guards, (parallelism, "auto", "on"), strict=True)
            ],
        )
        assert outs[2].finish_reason == "wall_clock"
        turned_back += sum(out.metrics.overshoot_tokens for out in outs)
    assert turned_back > 0
