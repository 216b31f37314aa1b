"""An evaluation answers smaller budgets from larger runs only where that is the same, and runs nothing twice."""

import dataclasses

import pytest

from apr_jax import Engine, SamplingParams
from apr_jax.config import EngineConfig
from apr_jax.evaluation.budgets import TokenBudget, largest_first
from apr_jax.evaluation.records import RecordStore
from apr_jax.evaluation.runner import Entry, Evaluation
from apr_jax.evaluation.summary import paired_difference, summarize
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.sequential import SequentialProgram
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.tasks.countdown_task import TASKS

TASK = TASKS["countdown"]
PROBLEMS = TASK.problems(4, 1)
SAMPLING = SamplingParams(max_new_tokens=400)
TIMES = ("wall_s", "join_s", "engine_s")


@pytest.fixture(scope="module")
def engine():
    return Engine.from_checkpoint("countdown", engine_config=EngineConfig(max_threads=8))


def entry(engine, name: str) -> Entry:
    program = make_program(name, engine.tokenizer, options=StrategyOptions(num_samples=2, extract_answer=TASK.answer))
    return Entry(label=name, name=name, program=program)


def same(record) -> dict:
    """What two runs of one request have in common."""
    fields = dataclasses.asdict(record) | {"reused_from": None, "needed": None}
    fields["metrics"] = {k: v for k, v in record.metrics.items() if k not in TIMES and k != "overshoot_tokens"}
    return fields


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["critical_path", "total", "context"])
@pytest.mark.parametrize("name", ["sequential", "multiverse", "self_consistency"])
def test_reusing_a_run_gives_what_running_again_does(engine, name, kind):
    budgets = [None, *(TokenBudget(kind, tokens) for tokens in (350, 150, 80))]
    found = []
    for reuse in (True, False):
        evaluation = Evaluation(engine, TASK, PROBLEMS, SAMPLING, RecordStore({}), reuse=reuse)
        evaluation.run(entry(engine, name), budgets)
        found.append([record for budget in budgets for record in evaluation.records(entry(engine, name), budget)])
    assert [same(record) for record in found[0]] == [same(record) for record in found[1]]
    if (name, kind) != ("self_consistency", "total"):  # where samples deal the total
        assert any(record.reused_from == "unlimited" for record in found[0])
    assert not all(record.reused_from for record in found[0] if record.budget is not None)
    assert all(record.reused_from is None for record in found[1])


def test_nothing_runs_twice_and_interrupted_runs_go_on(engine):
    store = RecordStore({})
    evaluation = Evaluation(engine, TASK, PROBLEMS, dataclasses.replace(SAMPLING, max_new_tokens=20), store)
    sequential = entry(engine, "sequential")

    def stop_after_two(calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.run(sequential, [None], stop_after_two)
    kept = [store.get("sequential", None, number) for number in range(4)]
    assert sum(record is not None for record in kept) == 2
    assert not engine.scheduler.families
    evaluation.run(sequential, [None])
    for number, record in enumerate(kept):
        assert record is None or evaluation.records(sequential, None)[number] is record
    steps = engine.stats.num_steps
    evaluation.run(sequential, [None])
    assert engine.stats.num_steps == steps


def test_what_ends_beside_a_failing_request_is_recorded(engine):
    class Fails(SequentialProgram):
        def on_stop(self, thread, stop):
            if thread.prompt_ids == first:
                raise RuntimeError("as a program may")
            return super().on_stop(thread, stop)

    first = engine.encode_prompt(TASK.prompt(PROBLEMS[0], "sequential"))
    store = RecordStore({})
    evaluation = Evaluation(engine, TASK, PROBLEMS, dataclasses.replace(SAMPLING, max_new_tokens=20), store)
    with pytest.raises(RuntimeError, match="as a program may"):
        evaluation.run(Entry(label="fails", name="sequential", program=Fails()), [None])
    assert [store.get("fails", None, number) is not None for number in range(4)] == [False, True, True, True]


def test_an_edited_grammar_is_refused_where_it_has_results(engine):
    store = RecordStore({})
    evaluation = Evaluation(engine, TASK, PROBLEMS[:1], dataclasses.replace(SAMPLING, max_new_tokens=8), store)
    mine = dataclasses.replace(entry(engine, "sequential"), grammar_fingerprint="a")
    evaluation.run(mine, [None])
    evaluation.check_grammars([mine])
    with pytest.raises(ValueError, match="sequential has results of another text of that file"):
        evaluation.check_grammars([dataclasses.replace(mine, grammar_fingerprint="b")])


def test_engine_time_adds_up_to_the_wall_clock(engine):
    import time

    evaluation = Evaluation(engine, TASK, PROBLEMS, dataclasses.replace(SAMPLING, max_new_tokens=20), RecordStore({}))
    started_s = time.perf_counter()
    evaluation.run(entry(engine, "multiverse"), [None])
    elapsed_s = time.perf_counter() - started_s
    summary = summarize(evaluation.records(entry(engine, "multiverse"), None))
    assert isinstance(summary["run_s"], float) and 0 < summary["run_s"] <= elapsed_s
    assert summary["sampled_tokens"] == summary["total_tokens"]


def test_a_difference_to_itself_is_nothing(engine):
    evaluation = Evaluation(engine, TASK, PROBLEMS, dataclasses.replace(SAMPLING, max_new_tokens=60), RecordStore({}))
    evaluation.run(entry(engine, "sequential"), [None])
    records = evaluation.records(entry(engine, "sequential"), None)
    difference = paired_difference(records, records, "total_tokens")
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)


def test_budgets_are_run_from_the_largest_down():
    small, large = TokenBudget("total", 3), TokenBudget("total", 50)
    assert largest_first([small, None, large, small]) == [None, large, small]
    for kind, tokens in (("total", 0), ("time", 3)):
        with pytest.raises(ValueError, match=f"budget.* {tokens if tokens == 0 else repr(kind)}"):
            TokenBudget(kind, tokens)
