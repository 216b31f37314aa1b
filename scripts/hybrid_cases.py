"""Closed loops of `benchmark.py`: clients that ask for the next problem as soon as their last one is answered."""

import json
import statistics
import sys
import time
from typing import Any, cast

from rich.table import Table

from apr_jax import Engine, SamplingParams
from apr_jax.reasoning.driver import Driver, Run
from apr_jax.reasoning.metrics import mean_metrics
from apr_jax.reasoning.program import Parallelism, Request
from apr_jax.tasks.countdown_task import HELD_OUT_SEED, TASKS
from apr_jax.tasks.task import Task

MAX_NEW_TOKENS = 1280  # the longest right answers of the embedded model


def run_hybrid(engine: Engine, parallelism: str, num_requests: int, num_problems: int) -> dict[str, Any]:
    """One case: the same held-out problems whatever the number of clients, all of them on prompts for blocks.

    A request's latency is its wall clock, from its submission to its end.
    """
    task, program = TASKS["countdown"], engine.make_program("multiverse")
    problems = task.problems(num_problems, HELD_OUT_SEED)
    waiting, asked = iter(problems), {}
    engine.cache.flush_prefix_cache()
    dispatches = engine.stats.num_decode_dispatches
    started = time.perf_counter()
    with Driver(engine) as driver:

        def submit_next() -> None:
            problem = next(waiting, None)
            if problem is not None:
                request = Request(
                    token_ids=engine.encode_prompt(task.prompt(problem, "multiverse")),
                    sampling=SamplingParams(max_new_tokens=MAX_NEW_TOKENS),
                    parallelism=cast(Parallelism, parallelism),
                )
                asked[driver.submit(request, program)] = problem

        for _ in range(num_requests):
            submit_next()
        while driver.active:
            for run in driver.step():
                if run.error is not None:
                    raise run.error
                submit_next()
    seconds = time.perf_counter() - started
    result = {
        "name": f"hybrid_{parallelism}_requests{num_requests}",
        "decode_dispatches": engine.stats.num_decode_dispatches - dispatches,
        **_summary(engine, task, asked, seconds),
    }
    print(json.dumps(result), file=sys.stderr, flush=True)  # the cases take minutes
    return result


def _summary(engine: Engine, task: Task, asked: dict[Run, Any], seconds: float) -> dict[str, Any]:
    outputs = {run: engine.collect(run) for run in asked}
    verdicts = [task.check(problem, outputs[run].text) for run, problem in asked.items()]
    latencies = sorted(run.wall_s for run in asked)
    metrics = mean_metrics([output.metrics for output in outputs.values()])
    return {
        "tokens_per_s": metrics["total_tokens"] * len(asked) / seconds,
        "problems_per_s": len(asked) / seconds,
        "latency_mean_s": statistics.mean(latencies),
        "latency_p50_s": statistics.median(latencies),
        "latency_p95_s": latencies[max(0, -(-95 * len(latencies) // 100) - 1)],
        "accuracy": sum(verdict.correct for verdict in verdicts) / len(verdicts),
        "well_formed": sum(task.well_formed(output.text) for output in outputs.values()) / len(outputs),
        "num_problems": len(asked),
        "baseline": None,
        "baseline_tokens_per_s": None,
        "ratio": None,
        **{name: metrics[name] for name in ("num_threads", "total_tokens", "critical_path_tokens", "overshoot_tokens")},
    }


def hybrid_table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="closed loops of Countdown problems")
    columns = {
        "latency mean s": "latency_mean_s",
        "p50": "latency_p50_s",
        "p95": "latency_p95_s",
        "problems/s": "problems_per_s",
        "tokens/s": "tokens_per_s",
        "threads": "num_threads",
        "accuracy": "accuracy",
    }
    for column in ("case", *columns):
        table.add_column(column, justify="left" if column == "case" else "right", overflow="fold")
    for result in results:
        table.add_row(result["name"].removeprefix("hybrid_"), *(f"{result[key]:,.3g}" for key in columns.values()))
    return table
