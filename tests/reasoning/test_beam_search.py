"""Searches in steps, against the same search written as loops over strings."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transcripts import assert_all_pages_free, scripted_engine

from apr_jax.engine.thread import Status
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.program import Guards, Request
from apr_jax.reasoning.strategies.beam_search import BeamSearch, DiverseVerifierTreeSearch
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.reasoning.text import chain_ids
from apr_jax.testing import byte_tokenizer
from apr_jax.types import SamplingParams

LONG = SamplingParams(max_new_tokens=600)
TOKENIZER = byte_tokenizer()


def draw(seed, *what):
    return int.from_bytes(hashlib.blake2b(repr((seed, what)).encode(), digest_size=4).digest(), "big")


def step(seed, before, ordinal):
    """What the candidate of that ordinal says behind a text; without a line's end, it is the end."""
    drawn = draw(seed, before, ordinal)
    said = chr(97 + drawn % 26) * (1 + drawn % 7)
    return said if drawn // 26 % 4 == 0 else said + "\n"


def script(seed):
    def say(thread, ids):
        before = TOKENIZER.decode(chain_ids(thread.parent)) if thread.parent is not None else ""
        said = TOKENIZER.encode(step(seed, before, thread.path[-1][1]))
        return said[len(ids)] if len(ids) < len(said) else TOKENIZER.eos_ids[0]

    return say


def by_hand(seed, options, diverse):
    """The final text of the search."""
    width, expansion = options.beam_width, options.expansion
    beams = [(i // expansion, step(seed, "", i)) for i in range(width * expansion)]
    for _ in range(options.max_steps):
        score = {beam: draw(seed, beam[1]) for beam in beams}
        groups = {beam[0] if diverse else 0 for beam in beams}
        kept = []
        for group in sorted(groups):
            inside = [beam for beam in beams if not diverse or beam[0] == group]
            kept += sorted(inside, key=lambda beam: -score[beam])[: 1 if diverse else width]
        beams = [beam for beam in kept if not beam[1].endswith("\n")]
        if len(beams) == len(kept) or _ == options.max_steps - 1:
            return max(kept, key=lambda beam: score[beam])[1]
        beams += [(b, text + step(seed, text, i)) for b, text in kept if text.endswith("\n") for i in range(expansion)]
    raise AssertionError("unreachable")


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (4, 4), (7, 2)]),
    st.sampled_from([1, 3, 8]),
    st.booleans(),
    st.sampled_from([(1, 1), (4, 3), (16, 32)]),
)
def test_the_search_ends_where_the_same_search_by_hand_does(seed, sizes, max_steps, diverse, load):
    options = StrategyOptions(
        num_samples=sizes[0], beam_width=sizes[1], max_steps=max_steps, score=lambda text: draw(seed, text)
    )
    program = (DiverseVerifierTreeSearch if diverse else BeamSearch)(TOKENIZER, options)
    engine = scripted_engine(script(seed), steps_per_dispatch=load[0], max_threads=load[1])
    outs = engine.generate(["P", "Q"], program, sampling=LONG, guards=Guards(max_depth=1, max_rounds=1))
    assert [out.text for out in outs] == [by_hand(seed, options, diverse)] * 2
    assert not outs[0].degraded and outs[0].threads[0].status == "finished"
    assert outs[0].metrics.total_tokens == outs[1].metrics.total_tokens
    assert_all_pages_free(engine)


def test_candidates_that_are_dropped_free_their_pages_and_the_only_one_left_takes_its_parents_place():
    texts = ["a" * 9 + "\n", "b" * 9 + "\n", "c" * 9 + "\n"]

    def say(thread, ids):
        said = TOKENIZER.encode(texts[thread.path[-1][1]])
        return said[len(ids)] if len(ids) < len(said) else TOKENIZER.eos_ids[0]

    engine = scripted_engine(say)
    options = StrategyOptions(num_samples=3, beam_width=1, max_steps=4, score=lambda text: text.count("b"))
    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=[1, 2], sampling=LONG), BeamSearch(TOKENIZER, options))
        while run.root.num_forks < 2:
            driver.step()
        statuses = [thread.status for thread in run.root.family.threads[1:4]]
        assert statuses == [Status.CANCELLED, Status.FINISHED, Status.CANCELLED]
        assert len(run.root.children) == 3 and len(run.root.joins) == 1
        driver.run()
    out = engine.collect(run)
    assert out.text == texts[1] * 4 and out.finish_reason == "steps"
    assert {thread.parent for thread in out.threads[1:]} == {0}
    assert out.metrics.total_tokens == 4 * 30 and out.metrics.critical_path_tokens == 40
    assert_all_pages_free(engine)


@pytest.mark.parametrize("bound", [{"max_family_tokens": 60}, {"max_family_tokens": 9}, {"max_thread_tokens": 5}])
@pytest.mark.parametrize("diverse", [False, True])
def test_what_exceeds_a_guard_still_ends_in_text(bound, diverse):
    engine = scripted_engine(script(3), num_pages=40, max_threads=3)
    options = StrategyOptions(num_samples=6, beam_width=2, score=lambda text: draw(3, text))
    program = (DiverseVerifierTreeSearch if diverse else BeamSearch)(TOKENIZER, options)
    outs = engine.generate(["P"] * 3, program, sampling=SamplingParams(max_new_tokens=30), guards=Guards(**bound))
    for out in outs:
        assert out.finish_reason in ("eos", "length", "steps")
        assert out.metrics.total_tokens <= bound.get("max_family_tokens", 1000)
    assert_all_pages_free(engine)


@pytest.mark.parametrize("steps", range(0, 20, 2))
def test_cancelling_at_any_moment_frees_all_pages(steps):
    engine = scripted_engine(script(5), steps_per_dispatch=4)
    options = StrategyOptions(num_samples=6, beam_width=3, score=lambda text: draw(5, text))
    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=[1, 2], sampling=LONG), BeamSearch(TOKENIZER, options))
        for _ in range(steps):
            driver.step()
        driver.cancel(run)
    assert_all_pages_free(engine)


def test_an_accepted_candidate_ends_the_search():
    engine = scripted_engine(script(1))
    seen = []

    def accept(prompt, text):
        seen.append(text)
        return text.count("\n") == 2

    options = StrategyOptions(num_samples=4, beam_width=2, score=lambda text: draw(1, text), accept=accept)
    out = engine.generate("P", BeamSearch(TOKENIZER, options), sampling=LONG)
    assert out.text.count("\n") == 2
    assert max(text.count("\n") for text in seen) == 2
    assert_all_pages_free(engine)
