"""Measures programs on a task: accuracy, tokens, critical path, form. All programs get the same problems.

The embedded model was never trained on the first 500 problems of seed 1, the default.

Examples:
  python scripts/evaluate.py --num_problems=500
  python scripts/evaluate.py --program=multiverse --temperature=0.7 --output_json=results.json
  python scripts/evaluate.py --checkpoint=runs/countdown/model --num_problems=200
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import cli
import loading
import program_flags
import sampling_flags
from absl import flags
from json_output import check_output_path, write_json
from loading import load_engine
from program_flags import PROGRAM_HELP, check_program, chosen_program, request_fields
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sampling_flags import sampling_params

from apr_jax import Engine, SamplingParams
from apr_jax.config import check
from apr_jax.reasoning.driver import Driver, Run
from apr_jax.reasoning.metrics import mean_metrics
from apr_jax.reasoning.output import Output
from apr_jax.reasoning.program import Request
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.tasks.countdown_task import HELD_OUT_SEED, TASKS
from apr_jax.tasks.task import Task

_TASK = flags.DEFINE_enum("task", "countdown", sorted(TASKS), "What is asked.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "countdown", "A preset's name, a checkpoint directory or a Hugging Face directory."
)
_PROGRAM = flags.DEFINE_list("program", ["sequential", "multiverse"], f"Any of {PROGRAM_HELP}.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", StrategyOptions.num_samples, "Samples of a strategy.")
_NUM_PROBLEMS = flags.DEFINE_integer("num_problems", 100, "Problems a program.")
_SEED = flags.DEFINE_integer("seed", HELD_OUT_SEED, "Of the problems and of sampling.")
_MAX_THREADS = flags.DEFINE_integer("max_threads", 32, "Threads that run side by side.")
flags.adopt_module_key_flags(sampling_flags)
flags.adopt_module_key_flags(loading)
flags.adopt_module_key_flags(program_flags)
_OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write the results into this file.")


def main() -> None:
    sampling = sampling_params(_SEED.value)
    request_fields()  # refused before a model is loaded
    names = list(dict.fromkeys(_PROGRAM.value))
    check(bool(names), f"--program is empty, name some of {PROGRAM_HELP}")
    for name in names:
        check_program(name)
    check(_NUM_SAMPLES.value >= 1, f"--num_samples={_NUM_SAMPLES.value}, must be >= 1")
    check(_NUM_PROBLEMS.value >= 1, f"--num_problems={_NUM_PROBLEMS.value}, must be >= 1")
    check(_SEED.value >= 0, f"--seed={_SEED.value}, must be >= 0")
    output_path = check_output_path(_OUTPUT_JSON.value) if _OUTPUT_JSON.value else None
    task = TASKS[_TASK.value]
    engine = load_engine(_CHECKPOINT.value, max_threads=_MAX_THREADS.value)
    problems = task.problems(_NUM_PROBLEMS.value, _SEED.value)
    console = Console()
    with cli.profile(), _progress(console) as progress:
        results = {}
        for name in names:
            bar = progress.add_task(name, total=len(problems))
            results[name] = _evaluate(engine, task, problems, name, sampling, lambda bar=bar: progress.advance(bar))
    console.print(_table(results))
    if output_path is not None:
        content = {
            "task": task.name,
            "num_problems": len(problems),
            "seed": _SEED.value,
            "programs": results,
        }
        write_json(output_path, content)


def _evaluate(
    engine: Engine,
    task: Task,
    problems: list[Any],
    program_name: str,
    sampling: SamplingParams,
    on_done: Callable[[], None],
) -> dict[str, float]:
    """Runs all problems under one program; as many side by side as the engine has slots."""
    program = chosen_program(engine, program_name, task, _NUM_SAMPLES.value)
    started_s = time.perf_counter()
    outputs: list[Output | None] = [None] * len(problems)
    waiting = iter(range(len(problems)))
    numbers: dict[int, int] = {}

    def submit(driver: Driver, number: int) -> None:
        prompt = engine.encode_prompt(task.prompt(problems[number], program_name))
        params = dataclasses.replace(sampling, seed=sampling.seed + number)
        run = driver.submit(Request(token_ids=prompt, sampling=params, **request_fields()), program)
        numbers[run.root.family.id] = number

    def ended(driver: Driver) -> Iterator[Run]:
        while driver.active:
            yield from driver.step()

    with Driver(engine) as driver:
        for number in itertools.islice(waiting, engine.config.max_threads):
            submit(driver, number)
        for run in ended(driver):
            if run.error is not None:
                raise run.error
            outputs[numbers[run.root.family.id]] = engine.collect(run)
            on_done()
            for number in itertools.islice(waiting, 1):
                submit(driver, number)
    done = [output for output in outputs if output is not None]
    verdicts = [task.check(problem, output.text) for problem, output in zip(problems, done, strict=True)]
    accuracy = sum(verdict.correct for verdict in verdicts) / len(done)
    metrics = mean_metrics([output.metrics for output in done])
    run_s = time.perf_counter() - started_s
    return {
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(done)),
        "well_formed": sum(task.well_formed(output.text) for output in done) / len(done),
        "degraded": sum(bool(output.degraded) for output in done) / len(done),
        "ended_by_length": sum(output.finish_reason in ("length", "context") for output in done),
        "forked": sum(len(output.threads) > 1 for output in done) / len(done),
        **metrics,
        "run_s": run_s,
        "tokens_per_s": metrics["total_tokens"] * len(done) / run_s,
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _table(results: dict[str, dict[str, float]]) -> Table:
    rows: list[tuple[str, Callable[[dict[str, float]], str]]] = [
        ("accuracy", lambda r: f"{r['accuracy']:.1%} ± {r['accuracy_se']:.1%}"),
        ("well-formed", lambda r: f"{r['well_formed']:.1%}"),
        ("forked", lambda r: f"{r['forked']:.1%}"),
        ("degraded", lambda r: f"{r['degraded']:.1%}"),
        ("runs ended by length", lambda r: f"{r['ended_by_length']}"),
        ("tokens", lambda r: f"{r['total_tokens']:.1f}"),
        ("critical path", lambda r: f"{r['critical_path_tokens']:.1f}"),
        ("acceleration ratio", lambda r: f"{r['acceleration_ratio']:.3f}"),
        ("parallel ratio", lambda r: f"{r['parallel_ratio']:.3f}"),
        ("threads", lambda r: f"{r['num_threads']:.2f}"),
        ("peak pages", lambda r: f"{r['peak_pages']:.1f}"),
        ("prefilled again", lambda r: f"{r['reprefill_tokens']:.1f}"),
        ("longest context", lambda r: f"{r['max_context_tokens']:.1f}"),
        ("join time (ms)", lambda r: f"{r['join_s'] * 1e3:.3f}"),
        ("wall clock (s)", lambda r: f"{r['wall_s']:.2f}"),
        ("tokens a second", lambda r: f"{r['tokens_per_s']:.0f}"),
    ]
    table = Table(title="means over problems; ± standard error")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for label, show in rows:
        table.add_row(label, *(show(result) for result in results.values()))
    return table


if __name__ == "__main__":
    cli.run(main)
