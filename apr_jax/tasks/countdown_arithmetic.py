"""How much of the arithmetic that a search writes down is right."""

import re
from collections.abc import Iterable

from apr_jax.tasks.countdown import Equation, Problem
from apr_jax.tasks.countdown_search import max_value_of, quad

_QUAD = re.compile(r" (\d{1,9}) (\d{1,9}) =((?: (?:\d+|\.)){4})(?!\d)")
_EQUATION = re.compile(r"(?<!\d) ?(\d{1,9}) ?([-+*/]) ?(\d{1,9}) ?= ?(\d{1,9})")


def count_equations(problem: Problem, texts: Iterable[str]) -> tuple[int, int]:
    """(equations, those of them that are wrong) in what threads of any format have written.

    Counted are `53 - 31 = 22`, with spaces or without, and each value of a quad (`22 26 = 4 48 . .`, see
    `countdown_search`); one that is missing where there is a value, or stands where there is none, is wrong.
    """
    max_value = max_value_of(problem)
    num_equations = num_wrong = 0
    for text in texts:
        for x, y, values in _QUAD.findall(text):
            for written, right in zip(values.split(), quad(int(x), int(y), max_value), strict=True):
                if written == "." and right is None:
                    continue
                num_equations += 1
                num_wrong += written != str(right)
        for left, operator, right, value in _EQUATION.findall(text):
            num_equations += 1
            num_wrong += not Equation(int(left), operator, int(right), int(value)).holds
    return num_equations, num_wrong
