"""What a recorder makes of events, against the engine's own state."""

import pytest
from traced import TOKENIZER, record
from transcripts import scripted_engine
from wild import say_anything, wild_program

from apr_jax.engine import events
from apr_jax.reasoning.deciding import first
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.program import Guards, Request
from apr_jax.testing import tiny_config
from apr_jax.tracing import Limits, Recorder
from apr_jax.types import SamplingParams


def compare_pages(engine, recorder):
    """A listener that counts, after each step, who reads which page."""

    def compare(event):
        if not isinstance(event, events.StepEvent):
            return
        readers: dict[int, set[int]] = {}
        for family in engine.scheduler.families.values():
            for thread in family.live:
                for page in (page for segment in thread.context.segments for page in segment.pages):
                    readers.setdefault(page, set()).add(thread.id)
        sample = recorder.trace("").samples[-1]
        assert sample.shared == sum(len(each) > 1 for each in readers.values())
        assert sample.private + sample.joined == sum(len(each) == 1 for each in readers.values())
        total = sample.private + sample.shared + sample.joined + sample.cached + sample.free
        assert total == engine.cache.pool.total

    return compare


def test_a_tree_is_told_whole():
    trace, (run,), (out,) = record(listeners=[compare_pages])
    assert [thread.label for thread in trace.threads] == [str(i) for i in range(10)]
    for told, thread, shown in zip(trace.threads, run.root.family.threads, out.threads, strict=True):
        pieces = [piece for piece in told.pieces if piece[0] in ("forced", "sampled")]
        assert "".join(text for _, text in pieces) == shown.text
        sampled = "".join(text for kind, text in pieces if kind == "sampled")
        assert sampled == TOKENIZER.decode([t for t, s in zip(thread.token_ids, thread.sampled, strict=True) if s])
        assert told.num_tokens == len(thread.token_ids) and told.num_sampled == sum(thread.sampled)
        assert told.parent == shown.parent
        fed = sum(run.num_fed for run in told.runs)
        assert fed == len(thread.prompt_ids) + len(thread.token_ids) - (told.stops[-1][1] == "eos")
    root = trace.threads[0]
    assert root.critical_path == out.metrics.critical_path_tokens
    assert sum(thread.num_tokens for thread in trace.threads if thread.on_path) == root.critical_path
    assert [piece for piece in root.pieces if piece[0] in ("fork", "join")] == [["fork", 0], ["join", 0]]
    assert root.forks[0].children == root.joins[0].children == [1, 2, 3] and root.joins[0].mode == "stitch"
    origins = {use.origin for use in root.segments}
    assert origins == {"own", "joined"} and {use.writer for use in root.segments} == set(range(10))
    child = trace.threads[4].segments
    assert [use.origin for use in child[-1:]] == ["own"] and {use.origin for use in child[:-1]} == {"forked"}
    assert max(use.max_readers for use in child) == 10  # all threads read the prompt
    assert trace.requests[0].metrics["total_tokens"] == out.metrics.total_tokens and not trace.incomplete


def test_losers_of_a_decision_are_told_apart():
    trace, _, (out,) = record((3,), when=first(), prompts=["Why?"])
    assert sorted(thread.status for thread in trace.threads) == ["dropped", "dropped", "finished", "joined"]
    assert sum(thread.num_dropped for thread in trace.threads) == out.metrics.overshoot_tokens > 0


@pytest.mark.parametrize("num_pages", [500, 60])
def test_wild_trees_are_told_within_bounds(num_pages):
    """Texts, paths and pages of random trees, preempted ones too; then the same events within narrow limits."""
    engine = scripted_engine(
        say_anything,
        model_config=tiny_config(max_position=400),
        **{"page_size": 4, "num_pages": num_pages, "max_threads": 4, "steps_per_dispatch": 4},
    )
    narrow = Limits(max_tokens=50, max_threads=7, max_samples=8, max_runs=12)
    with Recorder(engine) as recorder, Recorder(engine, narrow) as bounded, Driver(engine) as driver:
        engine.listeners.append(compare_pages(engine, recorder))
        runs = []
        for seed in range(12):
            sampling = SamplingParams(max_new_tokens=300, seed=seed, stop_ids=(1,))
            guards = Guards(max_rounds=4, max_width=[None, 2, 1][seed % 3])
            request = Request(token_ids=[7] * (1 + seed % 5 * 4), sampling=sampling, guards=guards)
            runs.append(driver.submit(request, wild_program(seed)))
        driver.run()
    trace = recorder.trace("wild")
    for run, request in zip(runs, trace.requests, strict=True):
        told = [thread for thread in trace.threads if thread.request == trace.threads[request.root].request]
        for thread, shown in zip(run.root.family.threads, told, strict=True):
            text = "".join(piece[1] for piece in shown.pieces if piece[0] in ("forced", "sampled"))
            assert text == engine.tokenizer.decode(thread.token_ids) and shown.num_sampled == sum(thread.sampled)
        path = engine.collect(run).metrics.critical_path_tokens
        assert sum(thread.num_tokens for thread in told if thread.on_path) == path
    assert any(thread.preempted for thread in trace.threads)
    assert all(until is not None for thread in trace.threads for _, until in thread.preempted)
    few = bounded.trace("wild")
    assert len(few.threads) == 7 and len(few.samples) <= 8 and len(few.incomplete) == 4
    assert sum(len(thread.runs) for thread in few.threads) <= 12 + 7
    assert (few.samples[0].start, few.samples[-1].end) == (0, trace.samples[-1].end)
    assert min(sample.free for sample in few.samples) == min(sample.free for sample in trace.samples)


def test_limits_are_checked():
    with pytest.raises(ValueError, match="max_samples is 1, must be >= 2"):
        Limits(max_samples=1)
