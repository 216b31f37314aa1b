"""Self-consistency and best of n: votes and choices checked by hand and by brute force."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.engine.thread import Status
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.program import Guards, Request
from apr_jax.reasoning.strategies.best_of_n import BestOfN
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.reasoning.strategies.self_consistency import SelfConsistency, decide_vote
from apr_jax.testing import byte_tokenizer
from apr_jax.types import SamplingParams

LONG = SamplingParams(max_new_tokens=400)


def extract(text):
    return text[text.index("=") + 1 :] if "=" in text else None


def engine_saying(texts, **fields):
    return scripted_engine(Transcripts(byte_tokenizer(), {f"0.{i}": t for i, t in enumerate(texts)}), **fields)


def vote(count):
    return SelfConsistency(byte_tokenizer(), StrategyOptions(num_samples=count, extract_answer=extract, beam_width=1))


def final_winner(answers):
    """The vote counted to its end: most votes, ties to whoever came first."""
    counts = collections.Counter(a for a in answers if a is not None)
    return max(counts, key=lambda a: (counts[a], -answers.index(a))) if counts else None


@given(st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=1, max_size=8))
def test_a_vote_is_decided_as_soon_as_nothing_can_change_it(answers):
    found = decide_vote(answers, len(answers))
    assert found is not None
    winner, heard = found
    assert answers[winner] == final_winner(answers)
    assert heard == min(n for n in range(1, len(answers) + 1) if decide_vote(answers[:n], len(answers)))
    rest = len(answers) - heard
    for other in ("a", "b", "c", "unheard of"):  # what is still to come cannot change it
        assert rest == 0 or final_winner([*answers[:heard], *[other] * rest]) == answers[winner]
    if heard > 1:  # one voter less and it could have been
        rest += 1
        earlier = answers[: heard - 1]
        outcomes = {final_winner([*earlier, *[other] * rest]) for other in ("a", "b", "c", "unheard of", None)}
        assert len(outcomes) > 1


def test_the_majority_wins_and_late_voters_are_cut():
    texts = ["x" * 60 + "=9", "xx=7", "xxxx=5", "x=7", "xxxxxxxx=7"]
    engine = engine_saying(texts, steps_per_dispatch=16)
    out = engine.generate("P", vote(5), sampling=LONG)
    assert out.text == "x=7" and out.answer == "7" and out.finish_reason == "eos"
    lengths = [len(t.token_ids) for t in out.threads[1:]]
    assert lengths == [11, 5, 7, 4, 11]  # the fifth one decided it, at 11 tokens
    assert out.metrics.total_tokens == sum(lengths) and out.metrics.critical_path_tokens == 11
    assert out.metrics.overshoot_tokens > 0
    assert [t.status for t in out.threads] == ["finished", *["cancelled"] * 3, "finished", "cancelled"]
    assert_all_pages_free(engine)


def test_nobody_has_an_answer():
    engine = engine_saying(["long winded", "short", "none at all"])
    out = engine.generate("P", vote(3), sampling=LONG)
    assert out.text == "short" and out.answer is None
    assert_all_pages_free(engine)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["", "=1", "=2", "=3"])), min_size=1, max_size=6),
    st.sampled_from([1, 5, 16]),
    st.sampled_from([1, 2, 8]),
)
def test_the_outcome_is_a_vote_in_the_order_of_lengths_whatever_the_load(said, steps, threads):
    texts = ["x" * n + answer for n, answer in said]
    engine = engine_saying(texts, steps_per_dispatch=steps, max_threads=threads)
    out, other = engine.generate(["P", "Q"], vote(len(texts)), sampling=LONG)
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    winner, heard = decide_vote([extract(texts[i]) for i in order], len(texts))
    assert out.text == other.text == texts[order[winner]]
    cut = len(texts[order[heard - 1]]) + 1
    assert [len(t.token_ids) for t in out.threads[1:]] == [min(len(text) + 1, cut) for text in texts]
    assert_all_pages_free(engine)


def test_sixteen_samples_prefill_their_prompt_once_and_share_its_pages():
    engine = engine_saying(["=1"] * 16, num_pages=200)
    prompt = [1] * 240
    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=prompt, sampling=LONG, guards=Guards(max_fan_out=4)), vote(16))
        while not run.root.joins:
            driver.step()
        driver.run()
    out = engine.collect(run)
    counters = run.root.family.counters
    assert len(out.threads) == 17 and not out.degraded
    assert counters.prefill_tokens == 239  # the last one is what each child samples from
    assert out.metrics.peak_pages <= 240 // 4 + 16 * 2
    assert out.metrics.total_tokens == 16 * 3
    assert_all_pages_free(engine)


def test_repeated_votes_free_their_pages_before_the_vote_is_decided():
    engine = engine_saying(["=1", "x=1", "y" * 90 + "=2", "z" * 90 + "=2", "z" * 90 + "=2"], steps_per_dispatch=4)
    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=[1, 2], sampling=LONG), vote(5))
        for _ in range(8):
            driver.step()
        statuses = [child.status for child in run.root.children]
        assert statuses == [Status.STOPPED, Status.CANCELLED, *[Status.RUNNING] * 3]
        assert run.root.children[1].context is None
        driver.cancel(run)
    assert_all_pages_free(engine)


def test_samples_of_a_greedy_request_are_drawn_and_a_refused_fork_goes_on_alone():
    engine = scripted_engine(Transcripts(byte_tokenizer(), {"": "alone=4"}))
    seen = []
    engine.listeners.append(seen.append)
    assert vote(3).start(Request(token_ids=[1], sampling=LONG)).sampling.temperature == 0.7
    out = engine.generate("P", vote(3), sampling=LONG, guards=Guards(max_depth=0))
    assert out.text == "alone=4" and out.answer == "4" and len(out.threads) == 1
    assert out.degraded == ["thread 0: fork refused: depth 1 is beyond max_depth = 0"]
    assert_all_pages_free(engine)


def best(count, **fields):
    return BestOfN(byte_tokenizer(), StrategyOptions(num_samples=count, beam_width=1, **fields))


def test_a_sample_that_was_cut_loses_to_one_that_was_not():
    engine = engine_saying(["a" * 100, "bb", "a" * 100])
    guards = Guards(max_thread_tokens=20)
    out = engine.generate([1, 2], best(3, score=lambda text: text.count("a")), sampling=LONG, guards=guards)
    assert (out.text, out.finish_reason) == ("bb", "eos")
    plain = SelfConsistency(byte_tokenizer(), StrategyOptions(num_samples=3, beam_width=1))
    assert engine.generate([1, 2], plain, sampling=LONG, guards=guards).text == "bb"


def test_the_best_score_wins_and_all_others_come_free():
    texts = ["bb", "aaaa", "b" * 40, "aaaa"]
    engine = engine_saying(texts, steps_per_dispatch=4)
    calls = []

    def score(text):
        calls.append(text)
        return text.count("a")

    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=[1, 2], sampling=LONG), best(4, score=score))
        for _ in range(6):
            driver.step()
        held = [child.context is not None for child in run.root.children]
        assert held == [False, True, True, False]  # the longest still runs
        driver.run()
    out = engine.collect(run)
    assert out.text == "aaaa" and [t.status for t in out.threads[1:]] == [
        "cancelled", "finished", "cancelled", "cancelled"
    ]  # fmt: skip
    assert sorted(calls) == sorted(texts)
    assert out.metrics.critical_path_tokens == 41  # it was waited for
    assert out.metrics.total_tokens == 3 + 5 + 41 + 5
    assert_all_pages_free(engine)


def test_a_checker_ends_the_others_at_the_first_that_it_accepts():
    asked = []

    def accept(prompt, text):
        asked.append(prompt)
        return text.endswith("=7")

    texts = ["x" * 50 + "=7", "=5", "xxx=7"]
    engine = engine_saying(texts)
    out = engine.generate("P", best(3, accept=accept), sampling=LONG)
    assert out.text == "xxx=7" and out.metrics.critical_path_tokens == 6
    assert [len(t.token_ids) for t in out.threads[1:]] == [6, 3, 6]
    assert set(asked) == {"P"}
    none = engine_saying(["x" * 5, "aa"]).generate(
        "P", best(2, accept=lambda prompt, text: False, score=lambda text: text.count("a")), sampling=LONG
    )
    assert none.text == "aa"
    assert_all_pages_free(engine)


@pytest.mark.parametrize("count", [0, -1])
def test_no_samples_are_refused(count):
    with pytest.raises(ValueError, match=f"num_samples is {count}, must be >= 1"):
        StrategyOptions(num_samples=count)
