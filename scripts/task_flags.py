"""The flags that say what is asked."""

from pathlib import Path

from absl import flags

from apr_jax.config import check
from apr_jax.tasks.countdown_task import TASKS
from apr_jax.tasks.math_task import TEMPLATE, MathTask
from apr_jax.tasks.task import Task

_TASK = flags.DEFINE_enum(
    "task", "countdown", [*sorted(TASKS), MathTask.name], "What is asked; math takes --problems=FILE.jsonl."
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


def chosen_task() -> Task:
    """The task that the flags name.

    Raises:
      ValueError: a flag is missing or does not go with the task, or a file is not what it should be.
      OSError: a file cannot be read.
    """
    if _TASK.value != MathTask.name:
        for name, value in (("problems", _PROBLEMS.value), ("prompt_template", _PROMPT_TEMPLATE.value)):
            check(value is None, f"--{name} goes with --task={MathTask.name} only, not with --task={_TASK.value}")
        return TASKS[_TASK.value]
    if _PROBLEMS.value is None:
        raise ValueError(f"--task={MathTask.name} needs --problems=FILE.jsonl")
    template = TEMPLATE if _PROMPT_TEMPLATE.value is None else _PROMPT_TEMPLATE.value
    if template.endswith(".txt"):
        template = Path(template).expanduser().read_text(encoding="utf-8")
    return MathTask(_PROBLEMS.value, template)
