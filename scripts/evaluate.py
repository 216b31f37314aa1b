"""Measures programs on a task: accuracy against critical path, tokens, context and wall clock. Resumable.

All programs get the same problems. Those of seed 1, the default, are held out: the first 1,000 of countdown and
countdown_hard, 500 of countdown_five. (What early training of the embedded model did not leave out, its card says.)
With --output_dir every finished problem is on disk at once, and the same command goes on where it was stopped; it ends
with results.json, table.md and plots there.

Examples:
  python scripts/evaluate.py --num_problems=500
  python scripts/evaluate.py --program=sequential,multiverse,self_consistency,best_of_n+score=checker --output_dir=out
  python scripts/evaluate.py --program=multiverse,multiverse+when=first --output_dir=joins
  python scripts/evaluate.py --budgets=256,512,1024 --budget_kind=total --output_dir=budgets
  python scripts/evaluate.py --task=math --problems=my.jsonl --checkpoint=checkpoints/qwen3_8b --output_dir=math
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import cli
import loading
import program_flags
import sampling_flags
import task_flags
from absl import flags, logging
from evaluation_output import check_output_dir, console_table, progress, write_output
from json_output import check_output_path, write_json
from loading import CHECKPOINT_HELP, load_engine
from program_flags import OPTIONS_HELP, PROGRAM_HELP, check_programs, chosen_program, request_fields, warn_of_format
from rich.console import Console
from sampling_flags import sampling_params
from task_flags import chosen_task

from apr_jax.config import check
from apr_jax.evaluation import plots
from apr_jax.evaluation.budgets import KINDS, BudgetKind, TokenBudget
from apr_jax.evaluation.records import Record, RecordStore
from apr_jax.evaluation.runner import NO_BUDGET, Entry, Evaluation
from apr_jax.evaluation.settings import common_settings
from apr_jax.evaluation.summary import paired_difference, summarize
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.tasks.countdown_task import HELD_OUT_SEED
from apr_jax.tasks.task import Task

RECORDS_FILE = "records.jsonl"

_CHECKPOINT = flags.DEFINE_string("checkpoint", "countdown", CHECKPOINT_HELP)
_PROGRAM = flags.DEFINE_list("program", ["sequential", "multiverse"], f"Any of {PROGRAM_HELP}. {OPTIONS_HELP}")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", StrategyOptions.num_samples, "Samples of a strategy.")
_NUM_PROBLEMS = flags.DEFINE_integer("num_problems", 100, "Problems a program.")
_BUDGETS = flags.DEFINE_list(
    "budgets", [], f"Runs every program under each of these, in tokens; {NO_BUDGET} is one too. Empty: that alone."
)
_BUDGET_KIND = flags.DEFINE_enum(
    "budget_kind",
    "critical_path",
    list(KINDS),
    "What --budgets bound: the longest chain of tokens, the tokens of all threads, or the longest context (with the "
    "prompt).",
)
_SEED = flags.DEFINE_integer("seed", HELD_OUT_SEED, "Of the problems and of sampling.")
_MAX_THREADS = flags.DEFINE_integer("max_threads", 32, "Threads, and requests, that run side by side.")
_WARM_UP = flags.DEFINE_bool(
    "warm_up", False, "Compile everything before the first problem, so that no compilation is in the wall clock."
)
_OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write the results into this file.")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Keep every finished problem here, and write tables and plots; goes on with what is there."
)
for module in (sampling_flags, loading, program_flags, task_flags):
    flags.adopt_module_key_flags(module)


def main() -> None:
    sampling = sampling_params(_SEED.value)
    fields = request_fields()
    names = list(dict.fromkeys(_PROGRAM.value))
    check(bool(names), f"--program is empty, name some of {PROGRAM_HELP}")
    specs = check_programs(names)
    check(_NUM_SAMPLES.value >= 1, f"--num_samples={_NUM_SAMPLES.value}, must be >= 1")
    check(_NUM_PROBLEMS.value >= 1, f"--num_problems={_NUM_PROBLEMS.value}, must be >= 1")
    check(_SEED.value >= 0, f"--seed={_SEED.value}, must be >= 0")
    budgets = _budgets()
    output_path = check_output_path(_OUTPUT_JSON.value) if _OUTPUT_JSON.value else None
    output_dir = check_output_dir(_OUTPUT_DIR.value) if _OUTPUT_DIR.value else None
    if output_dir is not None and (reason := plots.missing()) is not None:
        logging.warning(reason)
    task = chosen_task()
    problems = task.problems(_NUM_PROBLEMS.value, _SEED.value)
    engine = load_engine(_CHECKPOINT.value, max_threads=_MAX_THREADS.value)
    for spec in specs:
        warn_of_format(task, problems[0], spec)
    programs = [chosen_program(engine, name, task, _NUM_SAMPLES.value) for name in names]
    entries = [
        Entry(label=spec.label, name=spec.format, program=program, grammar_fingerprint=spec.grammar_fingerprint)
        for spec, program in zip(specs, programs, strict=True)
    ]
    settings = common_settings(engine, task, _CHECKPOINT.value, sampling, _NUM_SAMPLES.value, program_flags.defaults())
    with RecordStore(settings, None if output_dir is None else output_dir / RECORDS_FILE) as store:
        evaluation = Evaluation(engine, task, problems, sampling, store, **fields)
        results = _run(evaluation, entries, budgets)
    title = f"{task.name}: {len(problems)} problems (seed {_SEED.value}), model {Path(_CHECKPOINT.value).name}"
    content = _write(task, title, len(problems), results, settings, output_dir)
    if output_path is not None:
        write_json(output_path, {key: content[key] for key in ("task", "num_problems", "seed", "programs")})


def _budgets() -> list[TokenBudget | None]:
    budgets: list[TokenBudget | None] = []
    for text in _BUDGETS.value or [NO_BUDGET]:
        valid = text == NO_BUDGET or (text.isdecimal() and int(text) >= 1)
        check(valid, f"--budgets has {text!r}, must be numbers of tokens >= 1, or {NO_BUDGET}")
        kind = cast(BudgetKind, _BUDGET_KIND.value)
        budgets.append(None if text == NO_BUDGET else TokenBudget(kind, int(text)))
    return list(dict.fromkeys(budgets))


Results = dict[tuple[str, TokenBudget | None], list[Record]]


def _run(evaluation: Evaluation, entries: Sequence[Entry], budgets: Sequence[TokenBudget | None]) -> Results:
    """Runs what is not there yet; an interruption leaves what is finished in the store."""
    evaluation.check_grammars(entries)
    evaluation.check_prompts(entries)
    if _WARM_UP.value:
        evaluation.engine.warm_up()
    console = Console()
    results: Results = {}
    with cli.profile(), progress(console) as shown:
        for entry in entries:
            bar = shown.add_task(entry.label, total=len(evaluation.problems) * len(budgets))
            evaluation.run(entry, budgets, lambda bar=bar: shown.advance(bar))
            for budget in budgets:
                results[entry.label, budget] = evaluation.records(entry, budget)
    return results


def _write(
    task: Task, title: str, num_problems: int, results: Results, settings: dict[str, Any], output_dir: Path | None
) -> dict[str, Any]:
    """Shows the table, and writes it with the plots where a directory is named."""
    named = {_label(program, budget): records for (program, budget), records in results.items()}
    summaries = {name: summarize(records) for name, records in named.items()}
    first, *others = named
    differences = {name: paired_difference(named[name], named[first]) for name in others}
    console_table(summaries)
    content = {
        "task": task.name,
        "num_problems": num_problems,
        "seed": _SEED.value,
        "settings": settings,
        "programs": summaries,
        "accuracy_differences": {
            name: {"to": first, "mean": d.mean, "interval": [d.low, d.high]} for name, d in differences.items()
        },
    }
    if output_dir is not None:
        series = [
            plots.Series(label=program, results=[summaries[_label(p, b)] for p, b in results if p == program])
            for program in dict.fromkeys(program for program, _ in results)
        ]
        write_output(output_dir, content, summaries, differences, series, title)
    return content


def _label(program: str, budget: TokenBudget | None) -> str:
    return program if budget is None else f"{program}@{budget}"


if __name__ == "__main__":
    cli.run(main)
