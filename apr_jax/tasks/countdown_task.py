"""Countdown as a `Task`."""

import re

from apr_jax.tasks.countdown import Problem, check_equations, draw_problems, parse_equations
from apr_jax.tasks.countdown_format import BOS, EOS, MODES, extract_answer, format_prompt
from apr_jax.tasks.countdown_parse import well_formed
from apr_jax.tasks.task import Task, Verdict

HELD_OUT_SEED = 1  # `problems(500, HELD_OUT_SEED)` are never trained on
_PROMPT = re.compile(rf"\s*(?:{'|'.join(MODES.values())})?\s*(\d+(?:\s+\d+)+)\s*->\s*(\d+)\s*")
_CLOSERS = re.compile(rf"(?:</Path>|{EOS})\s*$")
_LABEL = re.compile(r"^\s*\d+:")


class CountdownTask:
    """APR's distribution: 4 numbers in [1, 99], targets in [10, 100], all solvable (see `Task`)."""

    name = "countdown"
    separator = " ;"
    fingerprint = "apr"

    def problems(self, num: int, seed: int) -> list[Problem]:
        return draw_problems(seed, num)

    def prompt(self, problem: Problem, program: str) -> str:
        return format_prompt(problem, program)

    def problem_of(self, prompt: str) -> Problem | None:
        match = _PROMPT.fullmatch(prompt.removeprefix(BOS))
        return Problem(tuple(map(int, match[1].split())), int(match[2])) if match else None

    def accept(self, prompt: str, text: str) -> bool:
        """Replays the equations behind the last ` =>`, those of a path (`... =>2: equations</Path>`) too."""
        problem = self.problem_of(prompt)
        said = _CLOSERS.sub("", text.rpartition("=>")[2])
        equations = parse_equations(_LABEL.sub("", said))
        return problem is not None and equations is not None and check_equations(problem, equations) is None

    def answer(self, text: str) -> str | None:
        return extract_answer(text)

    def well_formed(self, text: str) -> bool:
        return well_formed(text)

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


TASKS: dict[str, Task] = {"countdown": CountdownTask()}
