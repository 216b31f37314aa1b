"""The flags that say how a model reasons, shared by the scripts that generate."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast, get_args

from absl import flags, logging
from program_spec import OPTIONS_HELP as OPTIONS_HELP
from program_spec import PROGRAM_HELP as PROGRAM_HELP
from program_spec import WHEN_HELP, ProgramSpec, read_spec, read_when

from apr_jax import Engine
from apr_jax.config import check
from apr_jax.engine.thread import JoinMode
from apr_jax.reasoning.deciding import by_text
from apr_jax.reasoning.program import Guards, Parallelism, Program
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.reasoning.wrapped import InTurns
from apr_jax.tasks.task import Task

_JOIN = flags.DEFINE_enum(
    "join", None, ["stitch", "prefill", "conclusion"], "How a grammar's threads are joined, instead of its own way."
)
_WHEN = flags.DEFINE_string(
    "when",
    None,
    f"When a grammar's threads are joined: {WHEN_HELP}. first and quorum count threads that solve the task's problem, "
    "where the task can tell, else any that has ended.",
)
_PARALLELISM = flags.DEFINE_enum(
    "parallelism",
    "on",
    list(get_args(Parallelism)),
    "Whether the model may fork: off bans what leads to it, auto lets it where the engine is not busy.",
)
_BOUNDS = {
    "max_depth": "Forks above a thread.",
    "max_fan_out": "Children of one fork.",
    "max_rounds": "Forks of one thread.",
    "max_thread_tokens": "Tokens of one thread.",
    "max_family_tokens": "Tokens of all threads of a request.",
    "max_context_tokens": "Tokens that any one token attends to, the prompt's included.",
    "max_family_pages": "KV pages of all threads of a request.",
}
_GUARDS: dict[str, flags.FlagHolder] = {
    name: flags.DEFINE_integer(name, getattr(Guards(), name), f"{text} Beyond it a request goes on in plain text.")
    for name, text in _BOUNDS.items()
}
_GUARDS["max_width"] = flags.DEFINE_integer(
    "max_width", None, "Children of one fork that run side by side; the next one begins when one of them ends or waits."
)
_GUARDS["max_wall_s"] = flags.DEFINE_float("max_wall_s", None, "Seconds of a request; then it ends with what it has.")


def request_fields() -> dict[str, Any]:
    """Of `Request`: what the flags say of its bounds and its parallelism.

    Raises:
      ValueError: a bound is out of its range.
    """
    bounds: dict[str, Any] = {name: flag.value for name, flag in _GUARDS.items()}
    guards = Guards(**bounds)
    return {"guards": guards, "parallelism": _PARALLELISM.value}


def defaults() -> dict[str, Any]:
    """What the flags say for programs that do not say it themselves, and for all requests."""
    fields = request_fields()
    guards = {"guards": dataclasses.asdict(fields["guards"])}
    return {"join": _JOIN.value, "when": _WHEN.value, **fields, **guards}


def check_programs(texts: Sequence[str]) -> list[ProgramSpec]:
    """What `--program` spells.

    Raises:
      ValueError: what is no program, or a flag that is out of its range, or that none of the programs takes.
    """
    if _WHEN.value is not None:
        read_when(_WHEN.value, None, f"--when={_WHEN.value}")
    specs = [read_spec(text) for text in texts]
    for flag, is_taken in ((_JOIN, any(s.takes_join for s in specs)), (_WHEN, any(s.takes_when for s in specs))):
        check(flag.value is None or is_taken, f"--{flag.name}={flag.value} says nothing of {', '.join(texts)}")
    return specs


def warn_of_format(task: Task, problem: Any, spec: ProgramSpec) -> None:
    """Says so where a task has no prompts of its own for a grammar's file: a model may not fork on others."""
    if spec.name.endswith(".toml") and task.prompt(problem, spec.format) == task.prompt(problem, "sequential"):
        gets = f"{task.name} has no prompt for name = {spec.format!r}, so it gets that of sequential"
        logging.warning("%s: %s", spec.name, gets)


def chosen_program(engine: Engine, text: str, task: Task | None, num_samples: int) -> Program:
    """The program that `--program` spells; what it does not say itself, the flags say for all that it makes sense for.

    Args:
      task: says what a sample's answer is, for strategies that vote, and whether a thread solves the problem.
      num_samples: of a strategy.

    Raises:
      ValueError: a flag does not go with it, or its file is no grammar.
    """
    spec = read_spec(text)
    accept = None if task is None else task.accept
    uses_checker = spec.score == "checker"
    check(
        not uses_checker or accept is not None, f"--program={text}: there is no checker that does not know the answer"
    )
    num_samples = spec.num_samples or num_samples
    options = StrategyOptions(
        num_samples=num_samples,
        beam_width=spec.beam_width or min(StrategyOptions.beam_width, num_samples),
        max_steps=spec.max_steps or StrategyOptions.max_steps,
        thoughts=spec.thoughts,
        extract_answer=None if task is None else task.answer,
        separator=StrategyOptions.separator if task is None else task.separator,
        accept=accept if uses_checker else None,
        waits=spec.when == "all",
    )
    join = when = None
    if spec.takes_join:
        join = spec.join or cast(JoinMode | None, _JOIN.value)
    if spec.takes_when:
        wanted = spec.when or _WHEN.value
        if wanted not in (None, "all"):
            when = read_when(wanted, None if accept is None else by_text(engine.tokenizer, accept))
    program = make_program(spec.name, engine.tokenizer, join=join, when=when, options=options)
    return program if spec.max_width is None else InTurns(program, spec.max_width)
