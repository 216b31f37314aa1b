"""When a join happens: decisions against a sort by (length, ordinal), whatever the load; losers are cut and freed."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transcripts import Transcripts, assert_all_pages_free, scripted_engine

from apr_jax.engine import events
from apr_jax.engine.thread import Status
from apr_jax.reasoning.deciding import All, Deadline, Deciding, Quorum, by_text, first
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.grammar import GrammarProgram
from apr_jax.reasoning.program import Cancel, Finish, Fork, Guards, Join, Program, Request, Wait
from apr_jax.reasoning.programs import GRAMMARS, make_program
from apr_jax.testing import byte_tokenizer
from apr_jax.types import SamplingParams

LONG = SamplingParams(max_new_tokens=400)
PLAN = "<Goal><Outline>1: a</Outline><Outline>2: b</Outline><Outline>3: c</Outline></Goal>"


class Samples(Program):
    """Forks the prompt into children that say something each, and joins them."""

    name = "samples"
    block = None

    def __init__(self, count: int):
        self.count = count

    def start(self, request):
        return Fork([[]] * self.count, request.sampling)

    def on_stop(self, thread, stop):
        return Finish(stop.reason)

    def on_child(self, parent, ended, running):
        return Wait() if running else Join(ended, "stitch", [33])


def samples_engine(lengths, **fields):
    """Child i says lengths[i] - 1 letters and the end of the sequence; the root samples nothing."""
    texts = {"": ""} | {f"0.{i}": chr(97 + i) * (n - 1) for i, n in enumerate(lengths)}
    return scripted_engine(Transcripts(byte_tokenizer(), texts), **fields)


def decisive(engine, run, accepts, count):
    """Whether the state says already which children are joined: `count` accepted ones precede all that run."""
    ended = [(len(c.token_ids), i) for i, c in enumerate(run.root.children) if c.id in run.ended]
    running = [(len(c.token_ids), i) for i, c in enumerate(run.root.children) if c.id not in run.ended]
    return sum(i in accepts and all((n, i) < other for other in running) for n, i in ended) >= count


LOADS = st.fixed_dictionaries(
    {
        "steps_per_dispatch": st.sampled_from([1, 3, 16]),
        "max_threads": st.sampled_from([1, 3, 8]),
        "num_pages": st.sampled_from([64, 512]),
    }
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.sets(st.integers(0, 5)),
    st.integers(1, 3),
    LOADS,
    st.integers(0, 2),
)
def test_a_quorum_is_the_first_by_length_and_ordinal_whatever_the_load(lengths, accepts, count, load, neighbours):
    engine = samples_engine(lengths, **load)
    with Driver(engine) as driver:
        for i in range(neighbours):
            driver.submit(Request(token_ids=[1, i], sampling=LONG), Samples(len(lengths)))
        when = Quorum(count=count, accept=lambda child: child.path[-1][1] in accepts)
        program = Deciding(Samples(len(lengths)), when)
        run = driver.submit(Request(token_ids=[5, 6, 7], sampling=LONG), program)
        decode = engine.runner.decode

        def watched(batch):
            losers = [thread for thread in batch.threads if thread.parent is run.root]
            assert not losers or not decisive(engine, run, accepts, count)
            return decode(batch)

        engine.runner.decode = watched
        driver.run()
    out = engine.collect(run)
    ranked = sorted((n, i) for i, n in enumerate(lengths) if i in accepts)[:count]
    joined = sorted(i for _, i in ranked) if len(ranked) == count else range(len(lengths))
    assert out.text == "".join(chr(97 + i) * (lengths[i] - 1) for i in joined) + "!"
    cut = ranked[-1][0] if len(ranked) == count else max(lengths)
    assert [len(t.token_ids) for t in out.threads[1:]] == [min(n, cut) for n in lengths]
    assert out.metrics.total_tokens == sum(min(n, cut) for n in lengths) + 1
    assert out.metrics.critical_path_tokens == min(cut, max(lengths)) + 1
    assert not out.degraded
    assert_all_pages_free(engine)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 30), LOADS)
def test_a_deadline_joins_what_has_ended_within_it(lengths, tokens, load):
    engine = samples_engine(lengths, **load)
    out = engine.generate([5, 6], Deciding(Samples(len(lengths)), Deadline(tokens)), sampling=LONG)
    joined = [i for i, n in enumerate(lengths) if n <= tokens]
    cut = tokens
    if not joined:
        cut, i = min((n, i) for i, n in enumerate(lengths))
        joined = [i]
    assert out.text == "".join(chr(97 + i) * (lengths[i] - 1) for i in joined) + "!"
    assert [len(t.token_ids) for t in out.threads[1:]] == [min(n, cut) for n in lengths]
    assert_all_pages_free(engine)


def test_losers_are_cut_at_the_deciding_child_and_their_pages_come_free_at_once():
    engine = samples_engine([40, 6, 40], steps_per_dispatch=16, max_threads=3)
    told = []
    engine.listeners.append(told.append)
    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=[1] * 9, sampling=LONG), Deciding(Samples(3), first()))
        while not run.root.joins:
            driver.step()
        losers = [thread for thread in run.root.family.threads[1:] if thread.status is Status.CANCELLED]
        assert [len(thread.token_ids) for thread in losers] == [6, 6]
        engine.cache.flush_prefix_cache()
        size = engine.cache.page_size
        segments = run.root.context.segments
        assert engine.cache.pool.num_used == sum(-(-len(s.token_ids) // size) for s in segments)
        driver.run()
    out = engine.collect(run)
    overshoot = sum(e.num_tokens for e in told if isinstance(e, events.RewindEvent))
    sampled = sum(sum(e.sampled) for e in told if isinstance(e, events.TokenEvent))
    assert out.metrics.overshoot_tokens == overshoot > 0
    assert sampled + 1 == out.metrics.total_tokens + overshoot  # one token was forced at the join
    assert out.metrics.critical_path_tokens == 6 + 1
    assert_all_pages_free(engine)


def test_arrival_joins_whoever_is_seen_first_and_cuts_nobody():
    engine = samples_engine([30, 9, 12], steps_per_dispatch=4, max_threads=1)  # one after another
    out = engine.generate([1, 2], Deciding(Samples(3), first(arrival=True)), sampling=LONG)
    assert out.text == "a" * 29 + "!" and [len(t.token_ids) for t in out.threads[1:]] == [30, 0, 0]
    ranked = samples_engine([30, 9, 12], steps_per_dispatch=4, max_threads=1)
    assert ranked.generate([1, 2], Deciding(Samples(3), first()), sampling=LONG).text == "b" * 8 + "!"
    assert_all_pages_free(engine)


def test_children_of_a_grammar_are_accepted_by_what_they_say():
    tokenizer = byte_tokenizer()
    texts = {"": f"{PLAN} end", "0.0": "no</Path>", "0.1": "so slow a yes</Path>", "0.2": "slow, and no</Path>"}
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer)
    asked = []

    def accept(prompt, text):
        asked.append((prompt, text))
        return "yes" in text

    program = make_program("multiverse", tokenizer, when=first(by_text(tokenizer, accept)))
    out = engine.generate("P", program, sampling=LONG)
    assert out.text == f"{PLAN}<Path>2:so slow a yes</Path><Conclusion> end"
    assert ("P", "<Path>1:no</Path>") in asked
    assert [thread.status for thread in out.threads[1:]] == ["cancelled", "finished", "cancelled"]
    assert_all_pages_free(engine)


def test_a_thread_that_ends_the_request_cuts_the_others_whatever_the_load():
    grammar = dataclasses.replace(GRAMMARS["multiverse"], unclosed="stop", nested=False)
    texts = {"": f"{PLAN} end", "0.0": "a" * 40 + "</Path>", "0.1": "b" * 9, "0.2": "c" * 30 + "</Path>"}

    def outcome(**fields):
        engine = scripted_engine(Transcripts(byte_tokenizer(), texts), **fields)
        program = Deciding(GrammarProgram(grammar, byte_tokenizer()), first())
        out = engine.generate([1, 2], program, sampling=LONG)
        assert_all_pages_free(engine)
        return out.finish_reason, out.text, [(thread.status, thread.token_ids) for thread in out.threads]

    expected = outcome(steps_per_dispatch=1)
    assert expected[0] == "unclosed" and len({len(ids) for _, ids in expected[2][1:]}) == 1
    for steps, rows in ((16, 8), (16, 1), (3, 2)):
        assert outcome(steps_per_dispatch=steps, max_threads=rows) == expected


def test_all_waits_for_all():
    engine = samples_engine([3, 20])
    out = engine.generate([1, 2], Deciding(Samples(2), All()), sampling=LONG)
    assert out.text == "aa" + "b" * 19 + "!"
    assert out.metrics.overshoot_tokens == 0


@pytest.mark.parametrize("when", [first(), Quorum(count=2), Deadline(40)])
@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 25), min_size=12, max_size=12), LOADS)
def test_a_nested_grammar_decides_the_same_whatever_the_load(when, lengths, load):
    tokenizer = byte_tokenizer()
    texts = {"": f"{PLAN} end"}
    for i in range(3):
        texts[f"0.{i}"] = f"{'x' * lengths[i]}{PLAN}{'y' * lengths[3 + i]}</Path>"
        for j in range(3):
            n = lengths[(5 * i + j + 3) % 12]
            texts[f"0.{i}/0.{j}"] = f"{'z' * n}</Path>"

    def outcome(**fields):
        engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer, **fields)
        program = Deciding(engine.make_program("multiverse"), when)
        sampling = SamplingParams(max_new_tokens=900)
        out = engine.generate([1, 2, 3], program, sampling=sampling, guards=Guards(max_depth=3))
        assert_all_pages_free(engine)
        threads = sorted((thread.parent, thread.text) for thread in out.threads[1:4])
        metrics = out.metrics
        return out.text, threads, metrics.total_tokens, metrics.critical_path_tokens, out.degraded

    assert outcome(**load | {"num_pages": max(load["num_pages"], 256)}) == outcome(steps_per_dispatch=1)


class Idle(Samples):
    """Waits for nothing, but says what a test wants where nothing runs."""

    def __init__(self, act):
        super().__init__(2)
        self.act = act

    def on_stop(self, thread, stop):
        return Finish(stop.reason) if thread.parent is None else Wait()

    def on_child(self, parent, ended, running):
        return Join(ended, "stitch", [33])

    def on_idle(self, threads):
        return self.act(threads)


def test_a_program_is_asked_where_all_its_threads_wait():
    asked = []

    def act(threads):
        asked.append([len(thread.token_ids) for thread in threads])
        yield threads[0].parent, Cancel([threads[0]])
        yield threads[0], Wait()  # is gone
        yield threads[1], Finish("chosen")

    engine = samples_engine([3, 9], steps_per_dispatch=2)
    out = engine.generate([1, 2], Idle(act), sampling=LONG)
    assert asked == [[3, 9]] and out.text == "b" * 8 + "!"
    assert [thread.status for thread in out.threads] == ["finished", "cancelled", "finished"]
    assert_all_pages_free(engine)


def test_a_program_that_goes_round_in_circles_stalls():
    engine = samples_engine([3, 9])
    out = engine.generate([1, 2], Idle(lambda threads: [(threads[0], Wait())]), sampling=LONG)
    assert out.finish_reason == "stalled" and out.degraded == ["thread 0: the program waits for nothing"]
    assert_all_pages_free(engine)


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="count is 0"):
        Quorum(count=0)
    with pytest.raises(ValueError, match="a deadline is 0 tokens"):
        Deadline(0)
