"""All formats of a Countdown search by the name of the program that decodes them."""

import functools
from collections.abc import Callable

from apr_jax.tasks.countdown import Problem
from apr_jax.tasks.countdown_apr import render_apr, root_prompt
from apr_jax.tasks.countdown_format import FORMATS, format_prompt, render_blocks, render_sequential
from apr_jax.tasks.countdown_search import ReasoningTree
from apr_jax.tasks.trace import Trace

RENDERINGS: dict[str, Callable[[ReasoningTree], Trace]] = {
    "sequential": render_sequential,
    **{name: functools.partial(render_blocks, tags=tags) for name, tags in FORMATS.items()},
    "apr": render_apr,
}


def prompt_of(problem: Problem, program: str) -> str:
    """The prompt of a problem for a program; one that has no format of its own gets the sequential one."""
    if program == "apr":
        return root_prompt(problem)
    return format_prompt(problem, program if program in RENDERINGS else "sequential")
