r"""Problems of the user's own with `\boxed{}` answers, as a `Task`."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apr_jax.config import check
from apr_jax.tasks.boxed import last_boxed
from apr_jax.tasks.equality import Verifier
from apr_jax.tasks.task import Verdict

PROBLEM_FIELDS = ("problem", "question")
ANSWER_FIELDS = ("answer", "solution")
TEMPLATE = "{problem}\nReason step by step, and put your final answer within \\boxed{}.\n"


@dataclasses.dataclass(frozen=True)
class MathProblem:
    problem: str
    answer: str


def read_problems(path: str | Path) -> list[MathProblem]:
    r"""Problems from JSON lines.

    One object a line: `problem` or `question`, and `answer` or `solution`. An answer may be the bare value or hold it
    in a `\boxed{...}`, the last one of which counts; a solution must hold one. Other fields are left alone, empty
    lines are skipped.

    Raises:
      ValueError: a line is not that (the message has its number), or there is no problem.
      OSError: the file cannot be read.
    """
    problems = []
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                problems.append(_read_line(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    check(bool(problems), f"{path} holds no problem")
    return problems


def _read_line(line: str) -> MathProblem:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    check(isinstance(fields, dict), f"is {line.strip()[:40]!r}, must be an object")
    _, problem = _field(fields, PROBLEM_FIELDS)
    name, answer = _field(fields, ANSWER_FIELDS)
    boxed = last_boxed(answer)
    check(boxed is not None or (name == "answer" and "\\boxed" not in answer), f"{name} holds no whole \\boxed{{...}}")
    value = answer.strip() if boxed is None else boxed
    check(bool(value), f"{name} is empty")
    return MathProblem(problem, value)


def _field(fields: dict, names: tuple[str, ...]) -> tuple[str, str]:
    """The first of these fields that says something (null and empty text do not); numbers as text."""
    for name in names:
        value = fields.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        is_text = isinstance(value, str) or (is_number and not isinstance(value, bool))
        check(is_text, f"{name} is {value!r}, must be text or a finite number")
        return name, str(value)
    empty = [f"{name} is empty" for name in names if name in fields]
    raise ValueError(empty[0] if empty else f"has none of the fields {', '.join(names)}")


class MathTask:
    r"""Problems of a file, drawn in an order that the seed determines (see `Task`).

    Args:
      path: JSON lines, see `read_problems`.
      template: the prompt; `{problem}` stands for the problem, every other brace for itself.

    Raises:
      ValueError: math-verify is not installed, the file holds something else, or the template has no `{problem}`.
      OSError: the file cannot be read.
    """

    name = "math"
    separator = "\n\n"
    accept = None  # only the file knows whether an answer is right

    def __init__(self, path: str | Path, template: str = TEMPLATE):
        check("{problem}" in template, f"the prompt template {template!r} has no {{problem}}")
        self._verifier = Verifier()
        self._problems = read_problems(path)
        self._template = template

    @property
    def fingerprint(self) -> str:
        content = json.dumps([self._template, *map(dataclasses.asdict, self._problems)])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def problems(self, num: int, seed: int) -> list[MathProblem]:
        """At most all that the file holds."""
        order = np.random.default_rng(seed).permutation(len(self._problems))
        return [self._problems[i] for i in order[:num]]

    def prompt(self, problem: MathProblem, program: str) -> str:
        return self._template.replace("{problem}", problem.problem)

    def problem_of(self, prompt: str) -> MathProblem | None:
        return None

    def answer(self, text: str) -> str | None:
        return last_boxed(text)

    def well_formed(self, text: str) -> bool:
        return last_boxed(text) is not None

    def measure(self, problem: MathProblem, texts: Sequence[str]) -> dict[str, float]:
        """See `Task`: nothing."""
        return {}

    def check(self, problem: MathProblem, text: str) -> Verdict:
        answer = last_boxed(text)
        if not answer:
            return Verdict(correct=False, answer=answer, reason="there is no answer in a \\boxed{...}")
        if self._verifier.is_equal(problem.answer, answer):
            return Verdict(correct=True, answer=answer, reason=None)
        return Verdict(correct=False, answer=answer, reason=f"{answer} is not {problem.answer}")
