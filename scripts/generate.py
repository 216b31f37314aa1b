"""Answers a prompt under a program, shows its threads as they grow, then answer, verdict and metrics.

Without a flag the embedded model solves a Countdown problem: combine all the numbers to reach the target.

Examples:
  python scripts/generate.py
  python scripts/generate.py --prompt='5 17 38 60 -> 24' --program=sequential
  python scripts/generate.py --parallelism=off --max_wall_s=10
  python scripts/generate.py --temperature=0.8 --num_samples=4 --output_json=out.json
  python scripts/generate.py --trace=out.html
  python scripts/generate.py --checkpoint=out/model --task=countdown        # what train_sft.py has made
  python scripts/generate.py --checkpoint=checkpoints/qwen3_8b --prompt='Solve x^2 = 2.' --max_new_tokens=2048
"""

import dataclasses
from pathlib import Path
from typing import Any

import cli
import loading
import program_flags
import sampling_flags
import task_flags
import trace_output
from absl import flags
from json_output import check_output_path, write_json
from loading import CHECKPOINT_HELP, load_engine
from program_flags import OPTIONS_HELP, PROGRAM_HELP, check_programs, chosen_program, request_fields, warn_of_format
from program_spec import ProgramSpec
from rich.console import Console
from rich.table import Table
from sampling_flags import sampling_params
from task_flags import chosen_task
from thread_view import LiveView, PlainView, ThreadView
from trace_output import TraceFile, check_trace_path, traced

from apr_jax import Engine, SamplingParams
from apr_jax.config import check
from apr_jax.models.checkpoint import checkpoint_directory
from apr_jax.reasoning.driver import Driver
from apr_jax.reasoning.output import Output
from apr_jax.reasoning.program import Request
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.tasks.countdown_task import TASKS, CountdownTask
from apr_jax.tasks.math_task import MathTask
from apr_jax.tasks.task import Task, Verdict

BUILT_IN_PROMPT = "22 26 31 53 -> 27"  # of Countdown

_CHECKPOINT = flags.DEFINE_string("checkpoint", "countdown", CHECKPOINT_HELP)
_PROMPT = flags.DEFINE_string(
    "prompt",
    None,
    "The prompt, without a chat template. By default a built-in problem, if the task is Countdown.",
)
_PROGRAM = flags.DEFINE_string(
    "program", "multiverse", f"What decides when to fork and join: {PROGRAM_HELP}. {OPTIONS_HELP}"
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", None, "Answers, with seeds --seed, --seed + 1, ... (by default 1); of a strategy, its samples (8)."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first sample.")
flags.adopt_module_key_flags(sampling_flags)
flags.adopt_module_key_flags(loading)
flags.adopt_module_key_flags(program_flags)
flags.declare_key_flag("task")
flags.adopt_module_key_flags(trace_output)
_OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write the result into this file.")


def main() -> None:
    sampling = sampling_params(_SEED.value)
    request_fields()  # refused before a model is loaded
    (spec,) = check_programs([_PROGRAM.value])
    check(_NUM_SAMPLES.value is None or _NUM_SAMPLES.value >= 1, f"--num_samples={_NUM_SAMPLES.value}, must be >= 1")
    checkpoint_directory(Path(_CHECKPOINT.value).expanduser())  # refused before anything else is asked for
    task = chosen_task() if task_flags.is_chosen() else TASKS.get(Path(_CHECKPOINT.value).name)
    check(not isinstance(task, MathTask), "--task=math is for evaluate.py: here --prompt says what is asked")
    prompt = _read_prompt(task, spec)
    output_path = check_output_path(_OUTPUT_JSON.value) if _OUTPUT_JSON.value else None
    trace_path = check_trace_path()
    engine = load_engine(_CHECKPOINT.value)
    token_ids = engine.encode_prompt(prompt)
    engine.check_prompt(token_ids, sampling, request_fields()["guards"].max_family_pages)  # before it is printed
    with cli.profile(), traced(engine, trace_path, f"{_PROGRAM.value}: {prompt}") as trace:
        outputs, error = _generate(engine, task, spec, prompt, token_ids, sampling, trace)
    problem = task.problem_of(prompt) if task is not None else None
    verdicts = [
        task.check(problem, output.text) if task is not None and problem is not None else None for output in outputs
    ]
    console = Console()
    for output, verdict in zip(outputs, verdicts, strict=True):
        _show(console, output, verdict)
    console.print(_metrics_table(outputs))
    unused, page_size = engine.stats.max_unused_slots, engine.cache.page_size
    console.print(f"unused slots in pages of {page_size}: {unused:,} at most", highlight=False, soft_wrap=True)
    if output_path is not None:
        objects = [_as_object(o, v) for o, v in zip(outputs, verdicts, strict=True)]
        samples = {"samples": objects} if len(objects) > 1 else {}
        write_json(output_path, objects[0] | samples)
    if error is not None:
        raise error


def _read_prompt(task: Task | None, spec: ProgramSpec) -> str:
    """The prompt of the flags; a task's problem gets the form that the program's prompt has."""
    prompt = BUILT_IN_PROMPT if _PROMPT.value is None and isinstance(task, CountdownTask) else _PROMPT.value
    if prompt is None:
        raise ValueError(f"--prompt is needed with --checkpoint={_CHECKPOINT.value}")
    check(bool(prompt.strip()), f"--prompt={prompt!r} is empty: at least 1 token is needed")
    problem = task.problem_of(prompt) if task is not None else None
    bare = prompt.lstrip()[:1].isdigit()  # without the token that says how to reason
    if task is None or problem is None or not bare:
        return prompt
    warn_of_format(task, problem, spec)
    return task.prompt(problem, spec.format)


def _generate(
    engine: Engine,
    task: Task | None,
    spec: ProgramSpec,
    prompt: str,
    token_ids: list[int],
    sampling: SamplingParams,
    trace: TraceFile | None,
) -> tuple[list[Output], Exception | None]:
    """Runs all samples side by side and shows them; the first error of one, if any."""
    view = ThreadView(engine.tokenizer)
    engine.listeners.append(view)
    program = chosen_program(engine, _PROGRAM.value, task, _NUM_SAMPLES.value or StrategyOptions.num_samples)
    num_answers = 1 if spec.is_strategy else _NUM_SAMPLES.value or 1
    console = Console()
    console.print(f"prompt: {prompt}", markup=False, highlight=False, soft_wrap=True)
    with Driver(engine) as driver:
        runs = [
            driver.submit(
                Request(
                    token_ids=token_ids,
                    sampling=dataclasses.replace(sampling, seed=sampling.seed + i),
                    **request_fields(),
                ),
                program,
            )
            for i in range(num_answers)
        ]
        if console.is_terminal:
            with LiveView(view, console) as live:
                while driver.active:
                    driver.step()
                    live.update()
        else:
            engine.listeners.append(PlainView(view, lambda line: print(line, flush=True)))
            driver.run()
    error = next((run.error for run in runs if run.error is not None), None)
    outputs = [engine.collect(run) for run in runs]
    if trace is not None:
        trace.measured((run.root.family.id for run in runs), outputs)
    return outputs, error


def _show(console: Console, output: Output, verdict: Verdict | None) -> None:
    answer = output.answer if verdict is None else verdict.answer
    console.print(f"answer: {answer}", markup=False, highlight=False, soft_wrap=True)
    if verdict is not None:
        text = "correct" if verdict.correct else f"wrong: {verdict.reason}"
        style = "bold green" if verdict.correct else "bold red"
        console.print(f"verdict: {text}", style=style, markup=False, highlight=False, soft_wrap=True)
    if output.finish_reason not in ("eos", "stop_id", "stop_string"):
        console.print(f"ended early: {output.finish_reason}", style="yellow")


def _metrics_table(outputs: list[Output]) -> Table:
    table = Table(title="metrics")
    table.add_column("metric")
    for number in range(len(outputs)):
        table.add_column("value" if len(outputs) == 1 else f"sample {number}", justify="right")
    for field in dataclasses.fields(outputs[0].metrics):
        values = [getattr(output.metrics, field.name) for output in outputs]
        table.add_row(field.name, *(f"{v:.4g}" if isinstance(v, float) else f"{v:,}" for v in values))
    return table


def _as_object(output: Output, verdict: Verdict | None) -> dict[str, Any]:
    return {
        "text": output.text,
        "answer": output.answer if verdict is None else verdict.answer,
        "correct": None if verdict is None else verdict.correct,
        "program": output.program,
        "threads": [dataclasses.asdict(thread) for thread in output.threads],
        "metrics": dataclasses.asdict(output.metrics),
        "finish_reason": output.finish_reason,
        "degraded": output.degraded,
    }


if __name__ == "__main__":
    cli.run(main)
