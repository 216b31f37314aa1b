"""Forking forbidden, or left to the load: what is said then, by whom, and on how many rows."""

import jax
import jax.numpy as jnp
import pytest
import test_apr
from test_guards import PROGRAMS, TOKENIZERS, Talkative
from test_join_oracle import ONE
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine.runner import Runner
from apr_jax.engine.thread import Status
from apr_jax.reasoning.api import Engine
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.grammar import Grammar, GrammarProgram
from apr_jax.reasoning.program import Request
from apr_jax.reasoning.programs import STRATEGIES, make_program
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.testing import tiny_config, tiny_decoder
from apr_jax.tokenizers import ByteTokenizer
from apr_jax.types import SamplingParams

LONG = SamplingParams(max_new_tokens=2000)
PLANS = {
    "multiverse": "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>",
    "npr": "<guideline><plan>1: a</plan><plan>2: b</plan></guideline>",
    "threadweaver": "<Parallel><Outlines><Outline>1: a</Outline><Outline>2: b</Outline></Outlines>",
    "parallel_r1": "<Parallel>",
    "apr": "<Calling Sub Searches>",
}
OPENERS = ("<Parallel>", "<guideline>", "<Calling")
LEADS = {name: test_apr.BEFORE if name == "apr" else "Hm. " for name in PLANS}
PROMPTS = {name: test_apr.PROMPT if name == "apr" else "Q" for name in PLANS}


class Willing:
    """Roots that want to fork; where they may not they say something else, and want to again, `wishes` times in all."""

    def __init__(self, name, tokenizer, wishes=1):
        self.tokenizer, self.wishes = tokenizer, wishes
        self.children = Talkative(name, tokenizer)
        self.lead, self.plan, self.alone, self.end = map(tokenizer.encode, (LEADS[name], PLANS[name], "alone. ", "7"))

    def __call__(self, thread, ids):
        if thread.parent is not None:
            return self.children(thread, ids)
        if thread.joins:
            before = sum(thread.sampled[: thread.joins[-1].at])
            said = self.end[thread.num_sampled + len(ids) - len(thread.token_ids) - before :]
            return said[0] if said else self.tokenizer.eos_ids[0]
        rest = ids[len(self.lead) :]
        if len(ids) < len(self.lead):
            return self.lead[len(ids)]
        for _ in range(self.wishes):
            if rest == self.plan[: len(rest)] and len(rest) < len(self.plan):
                avoided = thread.avoided_ids if len(ids) == len(thread.token_ids) else ()
                is_banned = self.plan[len(rest)] in (*thread.sampling.banned_ids, *avoided)
                return self.alone[0] if is_banned else self.plan[len(rest)]
            if len(rest) < len(self.alone):
                return self.alone[len(rest)]
            rest = rest[len(self.alone) :]
        return self.end[len(rest)] if len(rest) < len(self.end) else self.tokenizer.eos_ids[0]


def willing_engine(name, tokenizer, wishes=1, **fields):
    model = tiny_config(vocab_size=tokenizer.vocab_size, max_position=4096)
    fields = {"num_pages": 2048, "steps_per_dispatch": 8} | fields
    return scripted_engine(Willing(name, tokenizer, wishes), tokenizer, model_config=model, **fields)


def rows_by_family(engine):
    """Notes, at each decode dispatch, how many rows each family has and how many families there are."""
    seen = []
    decode = engine.runner.decode

    def watched(batch):
        ids = [thread.family.id for thread in batch.threads]
        seen.append(({i: ids.count(i) for i in set(ids)}, len(engine.scheduler.families)))
        return decode(batch)

    engine.runner.decode = watched
    return seen


@PROGRAMS
@TOKENIZERS
@pytest.mark.parametrize("wishes", [1, 5])
def test_off_answers_in_one_thread_without_a_tag(name, tokenizer, wishes):
    engine = willing_engine(name, tokenizer, wishes)
    out = engine.generate(PROMPTS[name], name, sampling=LONG, parallelism="off")
    assert out.text == LEADS[name] + "alone. " * wishes + "7"
    assert out.metrics.num_threads == 1 and out.metrics.acceleration_ratio == 0.0
    assert out.degraded == [] and out.finish_reason == "eos"
    assert (out.metrics.overshoot_tokens > 0) is (tokenizer is not ONE)  # what was written first, and taken back
    assert_all_pages_free(engine)


@PROGRAMS
@TOKENIZERS
def test_auto_forks_as_on_does_where_nobody_else_is_there(name, tokenizer):
    engine = willing_engine(name, tokenizer)
    on, auto = (
        engine.generate(PROMPTS[name], name, sampling=LONG, parallelism=parallelism) for parallelism in ("on", "auto")
    )
    assert len(on.threads) > 2 and not auto.degraded
    assert (auto.text, [t.text for t in auto.threads]) == (on.text, [t.text for t in on.threads])
    assert_all_pages_free(engine)


@PROGRAMS
@TOKENIZERS
def test_auto_answers_in_one_thread_where_everybody_has_a_row_at_most(name, tokenizer):
    engine = willing_engine(name, tokenizer, max_threads=3)
    outs = engine.generate([PROMPTS[name]] * 4, name, sampling=LONG, parallelism="auto")
    alone = f"{LEADS[name]}alone. 7"
    assert [out.text for out in outs[:2]] == [alone] * 2
    for out in outs:
        assert (len(out.threads) == 1) is (out.text == alone) is bool(out.degraded)
        if out.degraded:
            assert "taken back: there is room for " in out.degraded[0]
    assert_all_pages_free(engine)


def test_whoever_was_turned_back_forks_once_the_others_have_ended():
    engine = willing_engine("multiverse", ONE, wishes=7, max_threads=2)
    with Driver(engine) as driver:
        program = engine.make_program("multiverse")
        busy = driver.submit(Request(token_ids=[1, 2], sampling=LONG, parallelism="off"), program)
        run = driver.submit(Request(token_ids=[1, 2, 3], sampling=LONG, parallelism="auto"), program)
        while run.root.num_avoided < 3:
            driver.step()
        driver.cancel(busy)
        driver.run()
    out = engine.collect(run)
    plan = PLANS["multiverse"]
    assert out.text.startswith(f"Hm. {'alone. ' * 3}{plan}<Path>1:") and len(out.threads) > 2
    assert [line for line in out.degraded if line.startswith("thread 0")] == [
        "thread 0: <Parallel> taken back: there is room for 1 threads"
    ] * 3
    assert_all_pages_free(engine)


def test_whoever_is_turned_back_often_is_not_asked_again():
    engine = willing_engine("multiverse", ONE, wishes=40, max_threads=1)
    out = engine.generate("Q", "multiverse", sampling=LONG, parallelism="auto")
    assert out.text == "Hm. " + "alone. " * 40 + "7"
    assert len(out.degraded) == 9 and out.metrics.overshoot_tokens == 9
    assert_all_pages_free(engine)


@pytest.mark.parametrize("num_pages, forks", [(200, True), (13, False)])
def test_auto_looks_at_the_pages_too(num_pages, forks):
    engine = willing_engine("parallel_r1", ONE, num_pages=num_pages, page_size=4, max_threads=16)
    out = engine.generate("Q" * 24, "parallel_r1", sampling=LONG, parallelism="auto")
    assert (len(out.threads) > 1) is forks
    assert_all_pages_free(engine)


@pytest.mark.parametrize("num_requests, max_threads", [(1, 3), (2, 8), (3, 8), (3, 16)])
def test_paths_beyond_an_even_share_follow_in_waves_and_none_is_lost(num_requests, max_threads):
    plan = "<Parallel><Goal>" + "".join(f"<Outline>{i}: p</Outline>" for i in range(1, 9)) + "</Goal>"
    texts = {"": f"{plan} end"} | {f"0.{i}": f" path {i} {'x' * 9 * (i % 3)}</Path>" for i in range(8)}

    def answers(parallelism, threads):
        engine = scripted_engine(Transcripts(ONE, texts), ONE, max_threads=threads, steps_per_dispatch=4)
        seen = rows_by_family(engine)
        outs = engine.generate(["Q"] * num_requests, "multiverse", sampling=LONG, parallelism=parallelism)
        assert_all_pages_free(engine)
        return [out.text for out in outs], seen, [out.degraded for out in outs]

    texts_on, _, _ = answers("on", 32)
    texts_auto, seen, degraded = answers("auto", max_threads)
    assert texts_auto == texts_on and not any(degraded)
    assert max(max(rows.values()) for rows, _ in seen) > 1
    for rows, num_families in seen:
        assert max(rows.values()) <= -(-max_threads // num_families)


def test_a_newcomer_finds_a_row_beside_a_family_that_yields():
    plan = "<Parallel><Goal>" + "".join(f"<Outline>{i}: p</Outline>" for i in range(1, 13)) + "</Goal>"
    texts = {"": f"{plan} end"} | {f"0.{i}": f"{'x' * 20}</Path>" for i in range(12)}
    waited = {}
    for parallelism in ("on", "auto"):
        engine = scripted_engine(Transcripts(ONE, texts), ONE, max_threads=4, steps_per_dispatch=4)
        with Driver(engine) as driver:
            program = engine.make_program("multiverse")
            driver.submit(Request(token_ids=[1], sampling=LONG, parallelism=parallelism), program)
            while driver.active[0].root.status is not Status.FORKED:
                driver.step()
            newcomer = driver.submit(Request(token_ids=[2], sampling=LONG, parallelism="off"), program)
            waited[parallelism] = 0
            while not newcomer.root.token_ids:
                driver.step()
                waited[parallelism] += 1
            driver.run()
        assert_all_pages_free(engine)
    assert waited["auto"] < waited["on"]


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_strategy_that_may_not_fork_goes_on_alone(name):
    engine = scripted_engine(Transcripts(ONE, {"": "1. one\n"}), ONE)
    program = make_program(name, ONE, options=StrategyOptions(num_samples=3, beam_width=1))
    out = engine.generate("Q", program, sampling=LONG, parallelism="off")
    assert out.text.endswith("1. one\n") and len(out.threads) == 1
    assert any("fork refused: parallelism is off" in line for line in out.degraded)
    assert_all_pages_free(engine)


def test_other_values_are_refused():
    with pytest.raises(ValueError, match="parallelism is 'sometimes', not one of off, on, auto"):
        Request(token_ids=[1], parallelism="sometimes")  # type: ignore[arg-type]
    engine = willing_engine("multiverse", ONE)
    with pytest.raises(ValueError, match="11 banned ids, max_stop_ids"):
        engine.generate("Q", "multiverse", parallelism="off", sampling=SamplingParams(banned_ids=(1, 2, 3, 4, 5, 6)))
    assert_all_pages_free(engine)


# Against a search of our own: a model's greedy text that never holds a tag.

TAG_MODEL = tiny_config(num_layers=1, eos_ids=())
CACHE = CacheConfig(page_size=4, num_pages=300)
ENGINE = EngineConfig(dtype="float64", max_threads=2, steps_per_dispatch=4, prefill_chunk=16, max_tail_pages=2)


@pytest.fixture(scope="module")
def model_runner():
    with jax.enable_x64(True):
        yield Runner(TAG_MODEL, tiny_decoder(TAG_MODEL, 11, jnp.float64), CACHE, ENGINE)


@pytest.mark.parametrize("seed, tag_len", [(0, 2), (1, 2), (2, 2), (3, 2), (1, 3), (2, 3), (3, 3)])
def test_off_says_what_a_search_finds_that_never_writes_the_tag(seed, tag_len, model_runner):
    tokenizer = ByteTokenizer([f"<{i}>" for i in range(TAG_MODEL.vocab_size - 258)])
    engine = Engine(TAG_MODEL, None, tokenizer, cache_config=CACHE, engine_config=ENGINE, runner=model_runner)
    prompt = [60 + seed, 61, 62]

    def next_token(said, banned):
        params = SamplingParams(max_new_tokens=1, banned_ids=tuple(banned))
        return engine.generate(prompt + said, sampling=params).token_ids[0]

    free = engine.generate(prompt, sampling=SamplingParams(max_new_tokens=40)).token_ids
    ends = [i for i in range(tag_len, 41) if all(32 < t < 127 for t in free[i - tag_len : i])]
    tag = tokenizer.decode(free[ends[0] - tag_len : ends[0]])
    said, banned = [], {}
    while len(said) < 40:
        said.append(next_token(said, banned.get(len(said), [])))
        if tokenizer.decode(said).endswith(tag):
            del said[-tag_len:]
            token = tokenizer.encode(tag)[0]
            banned[len(said)] = [token]
    grammar = Grammar(
        name="g", block=(tag, "</>"), trigger=tag, num_paths=2, header="{label}", closer="\u20ac", after_join="!"
    )
    sampling = SamplingParams(max_new_tokens=40)
    out = engine.generate(prompt, GrammarProgram(grammar, tokenizer), sampling=sampling, parallelism="off")
    assert out.token_ids == said != free and banned
    assert tag not in out.text and out.metrics.num_threads == 1 and not out.degraded
    assert_all_pages_free(engine)
