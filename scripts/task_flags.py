"""The flags that say what is asked.

countdown                                           4 numbers in [1, 99], targets in [10, 100]: APR's distribution
countdown_hard, countdown_five                      the hardest fifth of it; 5 numbers
countdown+num_numbers=6+max_target=999              the dial turned by hand
countdown+min_hardness=12                           the search looks at 12 states or more
math                                                your own problems, with --problems=FILE.jsonl
"""

import dataclasses
from pathlib import Path

from absl import flags

from apr_jax.config import check
from apr_jax.tasks.countdown import ProblemConfig
from apr_jax.tasks.countdown_sets import ProblemSet
from apr_jax.tasks.countdown_task import TASKS, CountdownTask
from apr_jax.tasks.math_task import TEMPLATE, MathTask
from apr_jax.tasks.task import Task

_DIAL = (*(field.name for field in dataclasses.fields(ProblemConfig)), "min_hardness")
_TASK = flags.DEFINE_string(
    "task",
    None,
    f"What is asked: {', '.join(sorted(TASKS))}, or math, which takes --problems=FILE.jsonl. How hard countdown is can "
    f"be set behind it, as in countdown+num_numbers=5+max_target=999: {', '.join(_DIAL)}. APR's text ends at targets "
    "of 100. By default countdown; in generate.py that of the checkpoint's name, or none.",
)
_PROBLEMS = flags.DEFINE_string(
    "problems",
    None,
    "Of --task=math: JSON lines with problem (or question) and answer (or solution), the answer bare or in \\boxed{}.",
)
_PROMPT_TEMPLATE = flags.DEFINE_string(
    "prompt_template",
    None,
    f"Of --task=math: the prompt, with {{problem}} in it, or a file that holds it (PATH.txt). By default {TEMPLATE!r}.",
)


def is_chosen() -> bool:
    """Whether the flags say what is asked."""
    return any(flag.value is not None for flag in (_TASK, _PROBLEMS, _PROMPT_TEMPLATE))


def chosen_task() -> Task:
    """The task that the flags name; Countdown if they say nothing.

    Raises:
      ValueError: a flag is missing or does not go with the task, or a file is not what it should be.
      OSError: a file cannot be read.
    """
    name = _TASK.value or "countdown"
    if name != MathTask.name:
        for flag in (_PROBLEMS, _PROMPT_TEMPLATE):
            check(flag.value is None, f"--{flag.name} goes with --task={MathTask.name} only, not with --task={name}")
        return TASKS[name] if name in TASKS else _countdown(name)
    if _PROBLEMS.value is None:
        raise ValueError(f"--task={MathTask.name} needs --problems=FILE.jsonl")
    template = TEMPLATE if _PROMPT_TEMPLATE.value is None else _PROMPT_TEMPLATE.value
    if template.endswith(".txt"):
        template = Path(template).expanduser().read_text(encoding="utf-8")
    return MathTask(_PROBLEMS.value, template)


def _countdown(text: str) -> Task:
    """Countdown with the dial turned."""
    name, *options = text.split("+")
    names = f"{', '.join(sorted(TASKS))}, {MathTask.name} or countdown+OPTION=VALUE"
    check(name == "countdown" and bool(options), f"--task={text} is not one of {names}")
    dial: dict[str, int] = {}
    for option in options:
        key, _, value = option.partition("=")
        check(key in _DIAL, f"--task={text}: there is no option {key!r}, it takes {', '.join(_DIAL)}")
        check(key not in dial, f"--task={text}: {key} is there twice")
        check(value.isdecimal(), f"--task={text}: {key} is {value!r}, must be a whole number >= 0")
        dial[key] = int(value)
    try:
        hardness = {"min_hardness": dial.pop("min_hardness")} if "min_hardness" in dial else {}
        problem_set = ProblemSet(config=ProblemConfig(**dial), **hardness)
    except ValueError as error:
        raise ValueError(f"--task={text}: {error}") from error
    return CountdownTask(text, problem_set)
