"""`Guards.max_width`: children run in turns, and are counted so, against a clock; what is not needed never begins."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_deciding import LOADS, LONG, Samples, samples_engine
from transcripts import Transcripts, assert_all_pages_free, path_name, scripted_engine

from apr_jax.engine import events
from apr_jax.engine.spans import makespan, spans
from apr_jax.reasoning.deciding import Deadline, Deciding, Quorum, first
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.grammars.apr import CALLING, END_CALLING
from apr_jax.reasoning.program import Fork, Guards, Request
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.strategies.options import StrategyOptions, ThoughtOptions
from apr_jax.testing import byte_tokenizer
from apr_jax.tracing import Recorder
from apr_jax.types import SamplingParams

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=7)
WIDTHS = st.integers(1, 4)


def clock(lengths, max_width):
    """(start, end) of each child, tick by tick: whoever runs says one token, then the next ones begin."""
    left, starts, ends = list(lengths), {}, {}
    for now in range(sum(lengths) + 1):
        for i in range(len(lengths)):
            if i in starts and i not in ends and left[i] == 0:
                ends[i] = now
        for i in range(len(lengths)):
            if i not in starts and len(starts) - len(ends) < max_width:
                starts[i] = now
        for i in starts:
            left[i] -= i not in ends
    return [(starts[i], ends[i]) for i in range(len(lengths))]


@given(LENGTHS, WIDTHS)
def test_spans_are_those_of_a_clock(lengths, max_width):
    found = spans([(n, False) for n in lengths], max_width)
    assert [(span.start, span.end) for span in found] == clock(lengths, max_width)
    assert all(span.is_known for span in found)
    assert makespan(lengths, max_width) == max(end for _, end in clock(lengths, max_width))
    assert makespan(lengths, None) == max(lengths) and makespan([], max_width) == 0


@given(LENGTHS, WIDTHS, st.data())
def test_what_is_known_of_children_that_grow_stays_so(lengths, max_width, data):
    said = [(data.draw(st.integers(0, n)), data.draw(st.booleans())) for n in lengths]
    now = [(n, False) if has_ended else (k, True) for n, (k, has_ended) in zip(lengths, said, strict=True)]
    for span, (start, end) in zip(spans(now, max_width), clock(lengths, max_width), strict=True):
        assert span.start <= start and span.end <= end
        assert not span.is_known or (span.start, span.end) == (start, end)


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.sets(st.integers(0, 6)), st.integers(1, 3), WIDTHS, LOADS)
def test_a_quorum_is_the_first_by_the_clock_whatever_the_load(lengths, accepts, count, max_width, load):
    engine = samples_engine(lengths, **load)
    when = Quorum(count=count, accept=lambda child: child.path[-1][1] in accepts)
    guards = Guards(max_width=max_width)
    out = engine.generate([5, 6, 7], Deciding(Samples(len(lengths)), when), sampling=LONG, guards=guards)
    times = clock(lengths, max_width)
    ranked = sorted((times[i][1], i) for i in range(len(lengths)) if i in accepts)[:count]
    joined = sorted(i for _, i in ranked) if len(ranked) == count else range(len(lengths))
    assert out.text == "".join(chr(97 + i) * (lengths[i] - 1) for i in joined) + "!"
    cut = ranked[-1][0] if len(ranked) == count else max(end for _, end in times)
    said = [max(0, min(end, cut) - start) for start, end in times]
    assert [len(thread.token_ids) for thread in out.threads[1:]] == said
    assert out.metrics.total_tokens == sum(said) + 1
    assert out.metrics.critical_path_tokens == cut + 1
    assert not out.degraded
    assert_all_pages_free(engine)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 60), WIDTHS, LOADS)
def test_a_deadline_counts_from_the_fork(lengths, tokens, max_width, load):
    engine = samples_engine(lengths, **load)
    guards = Guards(max_width=max_width)
    out = engine.generate([5, 6], Deciding(Samples(len(lengths)), Deadline(tokens)), sampling=LONG, guards=guards)
    times = clock(lengths, max_width)
    cut, joined = tokens, [i for i, (_, end) in enumerate(times) if end <= tokens]
    if not joined:
        cut, i = min((end, i) for i, (_, end) in enumerate(times))
        joined = [i]
    assert out.text == "".join(chr(97 + i) * (lengths[i] - 1) for i in joined) + "!"
    assert [len(t.token_ids) for t in out.threads[1:]] == [max(0, min(end, cut) - start) for start, end in times]
    assert_all_pages_free(engine)


PLAN = "<Goal>" + "".join(f"<Outline>{i}: o</Outline>" for i in (1, 2, 3)) + "</Goal>"


@pytest.mark.parametrize("when", [None, first(), Quorum(count=2), Deadline(70)])
@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 25), min_size=12, max_size=12), WIDTHS, LOADS)
def test_a_nested_grammar_decides_the_same_whatever_the_load(when, lengths, max_width, load):
    tokenizer = byte_tokenizer()
    texts = {"": f"{PLAN} end"}
    for i in range(3):
        texts[f"0.{i}"] = f"{'x' * lengths[i]}{PLAN}{'y' * lengths[3 + i]}</Path>"
        for j in range(3):
            texts[f"0.{i}/0.{j}"] = f"{'z' * lengths[(5 * i + j + 3) % 12]}</Path>"

    def outcome(**fields):
        engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer, **fields)
        program = make_program("multiverse", tokenizer, when=when)
        guards = Guards(max_depth=3, max_width=max_width)
        out = engine.generate([1, 2, 3], program, sampling=SamplingParams(max_new_tokens=1500), guards=guards)
        assert_all_pages_free(engine)
        threads = sorted((thread.parent, thread.text) for thread in out.threads[1:4])
        metrics = out.metrics
        return out.text, threads, metrics.total_tokens, metrics.critical_path_tokens, out.degraded

    assert outcome(**load | {"num_pages": max(load["num_pages"], 256)}) == outcome(steps_per_dispatch=1)


def test_what_does_not_begin_costs_nothing():
    """Neither tokens nor rows nor overshoot; whoever listens hears that it is held, then of its forced tokens."""
    tokenizer = byte_tokenizer()
    texts = {"": f"{PLAN} end", "0.0": "no</Path>", "0.1": "yes</Path>", "0.2": "no</Path>"}
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer)
    told = []
    engine.listeners.append(told.append)
    program = make_program("multiverse", tokenizer, when=first(lambda child: child.path[-1][1] == 1))
    out = engine.generate("P", program, sampling=LONG, guards=Guards(max_width=1))
    assert out.text == f"{PLAN}<Path>2:yes</Path><Conclusion> end"
    assert [thread.text for thread in out.threads[1:]] == ["<Path>1:no</Path>", "<Path>2:yes</Path>", ""]
    assert out.metrics.overshoot_tokens == 0
    second = out.threads[2].id
    heard = [e for e in told if e.thread_id == second and isinstance(e, events.StopEvent | events.TokenEvent)]
    assert isinstance(heard[0], events.StopEvent) and heard[0].reason == "held"
    assert tokenizer.decode(heard[1].token_ids) == "<Path>2:"
    assert_all_pages_free(engine)


def test_nested_forks_take_turns_too():
    """Whoever goes on deep below a child keeps the next child waiting; so nothing is sampled beyond a decision."""
    tokenizer = byte_tokenizer()
    plan = "<Goal><Outline>1: o</Outline><Outline>2: o</Outline></Goal>"
    texts = {"": f"{plan} end"} | {f"0.{i}": f"{plan}y</Path>" for i in range(2)}
    texts |= {f"0.{i}/0.{j}": f"{'z' * 20}</Path>" for i in range(2) for j in range(2)}
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer, steps_per_dispatch=4)
    decode, num_rows, paths = engine.runner.decode, [], set()

    def watched(batch):
        num_rows.append(len(batch.threads))
        paths.update(map(path_name, batch.threads))
        return decode(batch)

    engine.runner.decode = watched
    accept_second = first(lambda child: len(child.path) == 1 or child.path[-1][1] == 1)
    program = make_program("multiverse", tokenizer, when=accept_second)
    sampling = SamplingParams(max_new_tokens=2000)
    out = engine.generate([1, 2, 3], program, sampling=sampling, guards=Guards(max_depth=3, max_width=1))
    assert max(num_rows) == 1 and "0.0/0.1" in paths and "0.1" not in paths
    assert out.metrics.overshoot_tokens == 0


class Heads(Samples):
    """Children that begin with forced tokens of their own."""

    def __init__(self, heads):
        super().__init__(len(heads))
        self.heads = heads

    def start(self, request):
        return Fork(self.heads, request.sampling)


@pytest.mark.parametrize("max_width", [1, 2])
@pytest.mark.parametrize("kind", ["critical_path", "total", "context"])
def test_what_a_budget_needs_counts_the_forced_tokens_of_those_that_never_begin(kind, max_width):
    """A fork is refused where they do not fit."""

    def outcome(bound):
        engine = samples_engine([5, 5, 5])
        bounds = {"critical_path": 700, "total": 900, "context": 300} | {kind: bound}
        guards = Guards(max_width=max_width, max_family_tokens=bounds["total"], max_context_tokens=bounds["context"])
        sampling = SamplingParams(max_new_tokens=bounds["critical_path"])
        with Driver(engine) as driver:
            program = Deciding(Heads([[40], [41], [42] * 50]), first())
            run = driver.submit(Request(token_ids=[1, 2], sampling=sampling, guards=guards), program)
            driver.run()
        out = engine.collect(run)
        return run.budget.needed[kind], (out.text, out.degraded, [len(t.token_ids) for t in out.threads])

    whole = {"critical_path": 700, "total": 900, "context": 300}[kind]
    needed, said = outcome(whole)
    assert 50 < needed < whole
    assert all(outcome(bound)[1] == said for bound in (needed, needed + 1, (needed + whole) // 2))


def test_stop_strings_begin_in_forced_tokens_in_turns_as_well():
    tokenizer = byte_tokenizer()
    texts = {"": ""} | {f"0.{i}": "xyzyz" for i in range(3)}

    def said(max_width):
        engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer)
        program = Heads([tokenizer.encode("ab", continuation=True)] * 3)
        sampling = SamplingParams(max_new_tokens=400, stop=("bxy",))
        out = engine.generate([1, 2], program, sampling=sampling, guards=Guards(max_width=max_width))
        return [thread.text for thread in out.threads[1:]]

    assert said(1) == said(2) == said(None) == ["abxy"] * 3


@pytest.mark.parametrize("max_width", [1, 2])
def test_proposed_thoughts_are_steps_in_turns_as_well(max_width):
    """Children that are to sample nothing stop as they would without turns, not for want of a budget."""
    tokenizer = byte_tokenizer()

    def script(thread, ids):
        said = tokenizer.encode("aa\nbb\ncc\n", continuation=True)
        at = thread.num_sampled + len(ids) - len(thread.token_ids)
        return said[at] if at < len(said) else tokenizer.eos_ids[0]

    def outcome(max_width):
        thoughts = ThoughtOptions(generate="propose", evaluate="score", search="beam")
        options = StrategyOptions(
            num_samples=3,
            beam_width=2,
            max_steps=2,
            separator="\n",
            score=lambda text: float(text.count("c")),
            thoughts=thoughts,
        )
        engine = scripted_engine(script, tokenizer)
        program = make_program("tree_of_thoughts", tokenizer, options=options)
        sampling = SamplingParams(max_new_tokens=400, temperature=1.0)
        out = engine.generate([1, 2], program, sampling=sampling, guards=Guards(max_width=max_width))
        return out.finish_reason, out.text, len(out.threads)

    assert outcome(max_width) == outcome(None) and outcome(None)[0] == "steps"


@pytest.mark.parametrize("max_width", [1, 2, None])
def test_out_of_time_all_children_are_joined_however_many_are_held(max_width):
    tokenizer = byte_tokenizer()
    plan = "<Goal>" + "".join(f"<Outline>{i}: o</Outline>" for i in range(1, 32)) + "</Goal>"
    texts = {"": f"{plan} end"} | {f"0.{i}": "z" * 40 + "</Path>" for i in range(31)}
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer, steps_per_dispatch=16, max_threads=8)
    guards = Guards(max_wall_s=20.0, max_width=max_width)
    with Driver(engine, lambda: float(engine.stats.num_steps)) as driver:
        request = Request(token_ids=[1, 2], sampling=SamplingParams(max_new_tokens=8000), guards=guards)
        run = driver.submit(request, make_program("multiverse", tokenizer))
        driver.run()
    assert run.finish_reason == "wall_clock" and len(run.root.joins[0].children) == 31
    assert_all_pages_free(engine)


def test_searches_that_never_begin_are_neither_counted_nor_drawn():
    tokenizer = byte_tokenizer()
    prompt = "Moving to Node #0\nCurrent State: 9:[1, 2, 3], Operations: []\n"
    nodes = "".join(
        f"Generated Node #0,{i}: 9:[{a}, {b}] Operation: {step}\n"
        for i, (a, b, step) in enumerate([(3, 3, "1+2=3"), (2, 4, "1+3=4"), (1, 5, "2+3=5")])
    )
    starts = "".join(f"\n<Start Sub Search {i} at level 1> Moving to Node #0,{i}" for i in range(3))
    texts = {"": f"{nodes}{CALLING}end", "0.0": f"{starts}\n{END_CALLING}"}
    texts |= {f"0.0/0.{i}": "9,9 equal: Goal Reached\npath: Goal Reached\n" for i in range(3)}
    engine = scripted_engine(Transcripts(tokenizer, texts), tokenizer, steps_per_dispatch=4)
    told = []
    engine.listeners.append(told.append)
    with Recorder(engine) as recorder:
        program, sampling = make_program("apr", tokenizer, when=first()), SamplingParams(max_new_tokens=1500)
        out = engine.generate(prompt, program, sampling=sampling, guards=Guards(max_width=1))
    assert [bool(thread.token_ids) for thread in out.threads] == [True, True, True, False, False]
    (spawned,) = [event.prompts for event in told if isinstance(event, events.ForkEvent) and event.prompts]
    prompts = len(engine.encode_prompt(prompt)) + len(spawned[0])
    assert out.metrics.sequence_tokens == out.metrics.total_tokens + prompts
    trace = recorder.trace("in turns")
    assert [thread.on_path for thread in trace.threads] == [True, True, True, False, False]
    assert trace.threads[0].critical_path == out.metrics.critical_path_tokens


@settings(deadline=None, max_examples=30)
@given(LENGTHS, WIDTHS, st.integers(20, 90))
def test_the_budget_of_the_critical_path_holds_in_turns_too(lengths, max_width, budget):
    engine = samples_engine(lengths)
    sampling = SamplingParams(max_new_tokens=budget)
    out = engine.generate([5, 6], Samples(len(lengths)), sampling=sampling, guards=Guards(max_width=max_width))
    assert out.metrics.critical_path_tokens <= budget + 1  # what the join forces


@pytest.mark.parametrize("answers, num_heard", [("aaaaaaaa", 4), ("abababab", 7), ("aabaacaa", 5)])
def test_a_vote_hears_no_more_samples_than_decide_it(answers, num_heard):
    texts = {"": ""} | {f"0.{i}": answer * (3 + i) for i, answer in enumerate(answers)}

    def vote(max_width, **fields):
        engine = scripted_engine(Transcripts(byte_tokenizer(), texts), **fields)
        options = StrategyOptions(num_samples=len(answers), extract_answer=lambda text: text[:1])
        program = make_program("self_consistency", byte_tokenizer(), options=options)
        out = engine.generate([1, 2], program, sampling=LONG, guards=Guards(max_width=max_width))
        assert_all_pages_free(engine)
        return out.answer, [len(thread.token_ids) for thread in out.threads[1:]], out.metrics.critical_path_tokens

    answer, said, path = vote(1)
    assert answer == "a" and sum(map(bool, said)) == num_heard
    assert path == sum(said)
    assert vote(1, steps_per_dispatch=1) == (answer, said, path)
    assert vote(3) == vote(3, steps_per_dispatch=1, max_threads=2)


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_request_may_end_while_children_are_held(after):
    engine = samples_engine([9, 9, 9, 9], steps_per_dispatch=4)
    with Driver(engine) as driver:
        run = driver.submit(Request(token_ids=[1, 2], sampling=LONG, guards=Guards(max_width=1)), Samples(4))
        late = Request(token_ids=[1, 3], sampling=LONG, guards=Guards(max_width=1, max_wall_s=1e-6))
        run_out = driver.submit(late, Samples(4))
        for _ in range(after):
            driver.step()
        driver.cancel(run)
        driver.run()
    assert run.finish_reason == "cancelled" and run_out.finish_reason == "wall_clock"
    assert_all_pages_free(engine)
