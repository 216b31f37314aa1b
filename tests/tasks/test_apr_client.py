"""APR's texts read as its published client reads them: line by line, lists as Python's; and what it splices.

Source: the rules of `parallel_infernce_utils.py` in the code that Pan et al. 2025 (arXiv 2504.15466) published.
"""

import ast
import itertools

import pytest

from apr_jax.tasks.countdown import ProblemConfig, draw_problem
from apr_jax.tasks.countdown_apr import render_apr
from apr_jax.tasks.countdown_search import search
from apr_jax.tasks.countdown_vocabulary import BOS, EOS
from apr_jax.tasks.trace import Block, Span, trace_text

GOAL = "Goal Reached"


def bare(parts) -> str:
    return trace_text(parts).replace(BOS, "").replace(EOS, "")


def state_of(text: str) -> tuple[int, list[int]]:
    target, _, numbers = text.strip().partition(":")
    return int(target), ast.literal_eval(numbers)


def called_prompts(text: str) -> list[str]:
    """The prompts that the client makes of a text that ends with a call."""
    lines = text.split("\n")
    assert lines[-1].endswith("<End Calling Sub Searches>")
    states = {}
    for line, below in itertools.pairwise(lines):
        if "Moving to Node #" in line and "Current State:" in below:
            state, _, operations = below.partition("Current State:")[2].partition(", Operations:")
            states[line.partition("#")[2].strip()] = (*state_of(state), ast.literal_eval(operations.strip()))
    for line in lines:
        if line.startswith("Generated Node #"):
            name, _, rest = line.removeprefix("Generated Node #").partition(": ")
            state, _, operation = rest.partition(" Operation: ")
            states.setdefault(name, (*state_of(state), [*states[name.rpartition(",")[0]][2], operation]))
    calls = [line.partition("Moving to Node #")[2].strip() for line in lines if line.startswith("<Start Sub Search")]
    names = calls[-lines[::-1].index("<Calling Sub Searches>") + 1 :]
    return [
        f"Moving to Node #{name}\nCurrent State: {target}:{numbers}, Operations: {operations}"
        for name, (target, numbers, operations) in ((name, states[name]) for name in names)
    ]


def spliced(text: str, searches: list[str]) -> str:
    """The text with the call replaced by what its searches found."""
    head, _, call = text.rpartition("<Calling Sub Searches>\n")
    lines = ["<Sub Searches>"]
    for start, found in zip(call.split("\n"), searches, strict=False):
        which = start.removeprefix("<Start ").replace("> Moving to", " at") + ">"
        if found.count(GOAL) < 2:
            lines.append(f"<No Solution in {which}")
        else:
            before_last = found.rindex(GOAL, 0, found.rindex(GOAL))
            lines += [f"<{GOAL} in {which}", found[before_last + len(GOAL) :].strip()]
    return head + "\n".join([*lines, "<End Sub Searches>\n"])


@pytest.mark.parametrize("num_numbers", [4, 5, 6])
def test_calls_are_read_and_their_results_spliced_as_by_the_published_client(num_numbers):
    num_calls = 0
    for index in range(40):
        trace = render_apr(search(draw_problem(555, index, ProblemConfig(num_numbers=num_numbers))))
        for place, part in enumerate(trace):
            if not isinstance(part, Block):
                continue
            call = bare(trace[:place]) + bare(part.branches[0])
            searches = [bare(each) for each in part.searches]
            prompts = [bare((Span(each[0].pieces[: each[0].forced]),)) for each in part.searches]
            assert called_prompts(call) == prompts
            assert (bare(trace[:place]) + bare(trace[place + 1 : place + 2])).startswith(spliced(call, searches))
            num_calls += 1
    assert num_calls >= 8
