"""Countdown as tasks, one for each of the held-out sets."""

import itertools
import re
from collections.abc import Sequence

from apr_jax.tasks.countdown import Problem, check_equations, parse_equations
from apr_jax.tasks.countdown_arithmetic import count_equations
from apr_jax.tasks.countdown_format import extract_answer
from apr_jax.tasks.countdown_parse import well_formed
from apr_jax.tasks.countdown_renderings import prompt_of
from apr_jax.tasks.countdown_sets import HELD_OUT_SEED as HELD_OUT_SEED
from apr_jax.tasks.countdown_sets import SETS, ProblemSet
from apr_jax.tasks.countdown_vocabulary import BOS, EOS, MODES
from apr_jax.tasks.task import Task, Verdict

_PROMPT = re.compile(rf"\s*(?:{'|'.join(MODES.values())})?\s*(\d+(?:\s+\d+)+)\s*->\s*(\d+)\s*")
_CLOSERS = re.compile(rf"(?:</Path>|</step>|</Thread>|{EOS})\s*$")
_LABEL = re.compile(r"^\s*\d+:")
_PATH = re.compile(r"\nOperations: ([^\n]*)\n[^\n]*Goal Reached\s*$")
_STATE = re.compile(r"\s*Moving to Node #0\nCurrent State: (\d+):\[([\d, ]+)\], Operations: \[\]\s*")


class CountdownTask:
    """Problems of a set, all solvable (see `Task`)."""

    separator = " ;"

    def __init__(self, name: str, problem_set: ProblemSet):
        self.name = name
        self.fingerprint = repr(problem_set)
        self._set = problem_set

    def problems(self, num: int, seed: int) -> list[Problem]:
        return list(itertools.islice(self._set.draw(seed), num))

    def prompt(self, problem: Problem, program: str) -> str:
        return prompt_of(problem, program)

    def problem_of(self, prompt: str) -> Problem | None:
        prompt = prompt.removeprefix(BOS)
        if match := _STATE.fullmatch(prompt):
            return Problem(tuple(map(int, match[2].split(","))), int(match[1]))
        match = _PROMPT.fullmatch(prompt)
        return Problem(tuple(map(int, match[1].split())), int(match[2])) if match else None

    def accept(self, prompt: str, text: str) -> bool:
        """Replays the equations behind the last ` =>`, those of a path (`=>2: equations</Path>`) too, and those that
        a search of APR's has reached the goal with.
        """
        problem = self.problem_of(prompt)
        said = _CLOSERS.sub("", text)
        path = _PATH.search(said)
        equations = parse_equations(path[1] if path else _LABEL.sub("", said.rpartition("=>")[2]))
        return problem is not None and equations is not None and check_equations(problem, equations) is None

    def answer(self, text: str) -> str | None:
        return extract_answer(text)

    def well_formed(self, text: str) -> bool:
        return well_formed(text)

    def measure(self, problem: Problem, texts: Sequence[str]) -> dict[str, float]:
        """See `Task`: how many equations were written, and how many of them are wrong."""
        num_equations, num_wrong = count_equations(problem, texts)
        return {"equations": num_equations, "wrong_equations": num_wrong}

    def check(self, problem: Problem, text: str) -> Verdict:
        answer = extract_answer(text)
        if answer is None:
            return Verdict(correct=False, answer=None, reason="there is no answer")
        equations = parse_equations(answer)
        if equations is None:
            found = "found nothing" if answer == "none" else "ended in something that is no list of equations"
            return Verdict(correct=False, answer=answer, reason=f"the search {found}")
        reason = check_equations(problem, equations)
        return Verdict(correct=reason is None, answer=answer, reason=reason)


TASKS: dict[str, Task] = {
    "countdown": CountdownTask("countdown", SETS["apr"]),
    "countdown_hard": CountdownTask("countdown_hard", SETS["hard"]),
    "countdown_five": CountdownTask("countdown_five", SETS["five"]),
}
