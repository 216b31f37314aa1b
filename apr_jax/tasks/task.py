"""What a task offers to the scripts: problems, prompts, a checker."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Attributes:
    correct: whether the answer solves the problem.
    answer: the answer found in the text, None if there is none.
    reason: why it is not correct; None if it is.
    """

    correct: bool
    answer: str | None
    reason: str | None


class Task(Protocol):
    """Problems with prompts and a checker. Only the task itself looks inside a problem."""

    name: str
    separator: str  # what a step of reasoning ends with, for searches

    @property
    def fingerprint(self) -> str:
        """Differs where the same numbers and seeds give other problems."""
        ...

    @property
    def accept(self) -> Callable[[str, str], bool] | None:
        """(prompt, what a thread has said) -> whether that solves the problem, judged without knowing the answer; None
        where this cannot be told.
        """
        ...

    def problems(self, num: int, seed: int) -> list[Any]:
        """`num` different problems, determined by the seed; fewer are a prefix of more."""
        ...

    def prompt(self, problem: Any, program: str) -> str:
        """The prompt that a program of that name is run on."""
        ...

    def problem_of(self, prompt: str) -> Any | None:
        """The problem behind a prompt; None if it is not one of this task's prompts."""
        ...

    def answer(self, text: str) -> str | None:
        """The final answer in a root's text; None if there is none."""
        ...

    def check(self, problem: Any, text: str) -> Verdict:
        """Judges a root's text."""
        ...

    def well_formed(self, text: str) -> bool:
        """Whether a flattened text (paths where they were forked) has the task's format."""
        ...

    def measure(self, problem: Any, texts: Sequence[str]) -> dict[str, float]:
        """What the task counts in the texts of a run's threads, beside the metrics of all tasks: the same names for
        every problem.
        """
        ...
