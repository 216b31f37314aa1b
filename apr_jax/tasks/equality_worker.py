"""The process behind `equality.Verifier`: reads pairs, one JSON list a line, and answers `true` or `false`.

Nothing limits its time in here: whoever started it kills it. Prints `ready` once math-verify is loaded.
"""

import json
import logging
import sys

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # type: ignore[import-not-found]

_KINDS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def is_equal(gold: str, answer: str) -> bool:
    """Whether two answers, LaTeX or plain, mean the same."""
    expected, found = (parse(f"\\boxed{{{text}}}", _KINDS, parsing_timeout=0) for text in (gold, answer))
    return verify(expected, found, timeout_seconds=None)


def main() -> None:
    logging.disable(logging.CRITICAL)
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            equal = is_equal(gold, answer)
        except Exception:  # whatever sympy makes of junk: it is not the answer
            equal = False
        print(json.dumps(bool(equal)), flush=True)


if __name__ == "__main__":
    main()
