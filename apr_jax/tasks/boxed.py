r"""The answer in a text: what stands in the last `\boxed{...}`."""

import re

_BOXED = re.compile(r"\\boxed\s*\{")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces are balanced; None if there is none.

    `\{` and `\}` are characters, not braces. A box that is never closed, as in a text that was cut, is no answer.
    """
    for match in reversed(list(_BOXED.finditer(text))):
        end = _closing_brace(text, match.end())
        if end is not None:
            return text[match.end() : end].strip()
    return None


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes one opened just before `start`."""
    depth, index = 1, start
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
        index += 1
    return None
