"""The flags that say how a model reasons, shared by the scripts that generate."""

from typing import Any, cast, get_args

from absl import flags

from apr_jax import Engine
from apr_jax.config import check
from apr_jax.engine.thread import JoinMode
from apr_jax.reasoning.program import Guards, Parallelism, Program
from apr_jax.reasoning.programs import PROGRAM_NAMES, STRATEGIES, make_program
from apr_jax.reasoning.strategies.options import StrategyOptions
from apr_jax.tasks.task import Task

PROGRAM_HELP = f"{', '.join(PROGRAM_NAMES)}, or a grammar's file.toml"

_JOIN = flags.DEFINE_enum(
    "join", None, ["stitch", "prefill", "conclusion"], "How a grammar's threads are joined, instead of its own way."
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
    "max_family_pages": "KV pages of all threads of a request.",
}
_GUARDS: dict[str, flags.FlagHolder] = {
    name: flags.DEFINE_integer(name, getattr(Guards(), name), f"{text} Beyond it a request goes on in plain text.")
    for name, text in _BOUNDS.items()
}
_GUARDS["max_wall_s"] = flags.DEFINE_float("max_wall_s", None, "Seconds of a request; then it ends with what it has.")


def request_fields() -> dict[str, Any]:
    """Of `Request`: what the flags say of its bounds and its parallelism.

    Raises:
      ValueError: a bound is out of its range.
    """
    bounds: dict[str, Any] = {name: flag.value for name, flag in _GUARDS.items()}
    guards = Guards(**bounds)
    return {"guards": guards, "parallelism": _PARALLELISM.value}


def check_program(name: str) -> None:
    """Refuses a name that is no program's. Raises ValueError."""
    known = name in PROGRAM_NAMES or name.endswith(".toml")
    check(known, f"--program={name} is not one of {PROGRAM_HELP}")


def chosen_program(engine: Engine, name: str, task: Task | None, num_samples: int) -> Program:
    """The program of a name.

    Args:
      task: says what a sample's answer is, for strategies that vote.
      num_samples: of a strategy.

    Raises:
      ValueError: a flag does not go with it, or its file is no grammar.
    """
    options = StrategyOptions(
        num_samples=num_samples,
        beam_width=min(StrategyOptions.beam_width, num_samples),
        extract_answer=None if task is None else task.answer,
    )
    join = cast(JoinMode | None, None if name in ("sequential", *STRATEGIES) else _JOIN.value)
    return make_program(name, engine.tokenizer, join=join, options=options)
