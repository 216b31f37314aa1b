"""Reads texts in the Countdown formats: is the structure right, and which trace is it?

Tags, labels and the shape of every line are checked, not the arithmetic. The text of a program is the flattened one:
all spans in reading order, paths where they were forked. APR's searches have texts of their own.
"""

import re
from collections.abc import Iterator, Sequence

from apr_jax.tasks.countdown_apr import CALLING, END_RETURNED, RETURNED
from apr_jax.tasks.countdown_format import FORMATS, Tags
from apr_jax.tasks.countdown_vocabulary import BOS, EOS, LABELS, LEFT, MARKER, MODES, NODES, NONE, vocabulary
from apr_jax.tasks.trace import Block, Span, Trace

_N, _S = r" \d{1,3}", r" (?:\d{1,3}|\.)"
_QUAD = rf"{_N}{_N} =(?:{_S}){{4}}"
_MISS, _MATCH = rf" \|{_QUAD} ~(?:{_S}){{4}}", rf" \|{_QUAD} ~(?:{_S}){{1,4}} !"
_SPLIT = rf"{_QUAD} \|{_QUAD}"
_FAILED_BODY = rf"(?:{_QUAD}{_MISS}(?: ,{_QUAD}{_MISS}){{2}}|{_SPLIT}(?:{_MISS})+)"
_SOLVED_BODY = rf"(?:(?:{_QUAD}{_MISS} ,){{0,2}}{_QUAD}{_MATCH}|{_SPLIT}(?:{_MISS})*{_MATCH})"
_HEADING = rf"{_N} [-+*/]{_N}"
_STEP = rf"{_HEADING} ={_N}{LEFT}(?:{_N}){{2,4}} ,"
_FAILED, _SOLVED = rf"(?:{_STEP}){{1,2}}{_FAILED_BODY}", rf"(?:{_STEP}){{1,2}}{_SOLVED_BODY}"
_OPENING = rf"{LEFT}(?:{_STEP}){{0,2}}"
_FAILED_OPENING, _SOLVED_OPENING = _OPENING + _FAILED_BODY, _OPENING + _SOLVED_BODY
_EQUATION = rf"{_N} [-+*/]{_N} ={_N}"
_EQUATIONS = rf"{_EQUATION}(?: ,{_EQUATION}){{1,4}}"
_NONE, _ANSWER = rf"{MARKER} none", rf"{MARKER}{_EQUATIONS}"

_PROMPT = re.compile(rf"(?:{'|'.join(MODES.values())})(?:{_N}){{3,6}} ->{_N}")
_LIST = r"\d+(?:, \d+)*"
_STATE = rf"\nCurrent State: \d+:\[{_LIST}\]"
_BARE = r"\d+[-+*/]\d+=\d+"
_ROOT_PROMPT = re.compile(rf"Moving to Node #0{_STATE}, Operations: \[\]")
_SEARCH_PROMPT = re.compile(rf"Moving to Node #0,\d+{_STATE}, Operations: \['{_BARE}'\]")
_PATH = rf"Moving to Node #0,\d+\nOperations: {_BARE}(?:, {_BARE}){{1,4}}\n\d+,\d+ equal: Goal Reached"
_GENERATED = rf"\n?Generated Node #0,\d+: \d+:\[{_LIST}\] Operation: {_BARE}"
_RESULT = (
    rf"(?:\n<No Solution in Sub Search \d+ at level 1 at Node #0,\d+>"
    rf"|\n<Goal Reached in Sub Search \d+ at level 1 at Node #0,\d+>\n{_PATH})"
)
_CALL = rf"(?:{_GENERATED})+\n{RETURNED}(?:{_RESULT})+\n{END_RETURNED}\n"
_APR_BODY = re.compile(rf"{_SOLVED_OPENING}{_ANSWER}|{_FAILED_OPENING}(?:{_NONE}| ;(?:{_CALL})+(?:{_ANSWER}|{_NONE}))")
_SEARCH_BODY = re.compile(
    rf"{LEFT}(?:{_STEP})?(?:{_FAILED_BODY}\nNo solution found\.|{_SOLVED_BODY}\n\d+,\d+ equal: Goal Reached\n{_PATH})"
)
_PIECE = re.compile(
    "|".join(
        re.escape(piece) + (r"(?!\[)" if piece in LABELS else "")  # `1:[` is a number before a list
        for piece in sorted(vocabulary(), key=len, reverse=True)
    )
)


def _joined(pieces: Sequence[str]) -> str:
    return re.escape("".join(pieces))


def _patterns(tags: Tags) -> tuple[str, str]:
    """A block, and one branch."""
    outline = rf"{_joined(tags.outline[:1])}\d+:{_HEADING}{_joined(tags.outline[1:])}"
    outlines = rf"{outline}(?:{_joined(tags.between)}{outline})*"
    begin = rf"{_joined(tags.header)}\d+:"
    branch = rf"{begin}(?:{_FAILED}{_NONE}|{_SOLVED}{MARKER}\d+:{_EQUATIONS}){_joined([tags.closer])}"
    plan = rf"{_joined(tags.plan)}{outlines}{_joined(tags.trigger)}{_joined(tags.before_fork)}"
    winner = rf"{_joined(tags.after_join)}{_joined(tags.conclusion)}(?:\d+:| none){_joined(tags.end)}"
    return rf"{plan}(?:{branch})+{winner}", branch


def _whole(tags: Tags) -> re.Pattern[str]:
    block, _ = _patterns(tags)
    begin, finish = _joined(tags.begin), _joined(tags.finish)
    solved = rf"{begin}{_SOLVED_OPENING}{finish}{_ANSWER}"
    lines = rf"(?: ;{_FAILED})*(?: ;{_SOLVED})?"  # of a thread that may not fork
    return re.compile(rf"{solved}|{begin}{_FAILED_OPENING}(?: ;(?:{block})+)?{lines}{finish}(?:{_ANSWER}|{_NONE})")


_WHOLE = {name: _whole(tags) for name, tags in FORMATS.items()}
_WHOLE["sequential"] = re.compile(
    rf"{_SOLVED_OPENING}{_ANSWER}|{_FAILED_OPENING}(?: ;{_FAILED})*(?: ;{_SOLVED}{_ANSWER}|{_NONE})"
)


def _split(text: str) -> tuple[str | None, str, str]:
    """(format, None if unknown from the prompt; prompt; the rest), without marks of begin and end."""
    text = text.removeprefix(BOS).removesuffix(EOS)
    if match := _ROOT_PROMPT.match(text):
        return "apr", match[0], text[match.end() :]
    if match := _PROMPT.match(text):
        mode = next(name for name, tag in MODES.items() if text.startswith(tag))
        return mode, match[0], text[match.end() :]
    return None, "", text


def structure_error(text: str) -> str | None:
    """What is wrong with a flattened text's structure; None if it is well-formed.

    Args:
      text: with the prompt, or without: then it may be in any format.
    """
    name, prompt, body = _split(text)
    patterns = {**_WHOLE, "apr": _APR_BODY}
    if not any(patterns[each].fullmatch(body) for each in ([name] if name else patterns)):
        return "the text is not in the format"
    num_numbers = len(re.findall(r"\d+", prompt)) - (2 if name == "apr" else 1)  # without the node, the target
    for equations in re.findall(rf"{MARKER}(?:\d+:)?({_EQUATIONS})", body) if name else ():
        if (count := equations.count("=")) != num_numbers - 1:
            return f"{count} equations conclude {num_numbers} numbers"
    for each, tags in FORMATS.items():
        if name in (None, each):
            for block, _ in _blocks(body, tags):
                if error := _block_error(block, tags):
                    return error
    return None


def search_error(text: str) -> str | None:
    """What is wrong with the text of one of APR's searches, its prompt included; None if it is well-formed."""
    text = text.removeprefix(BOS).removesuffix(EOS)
    prompt = _SEARCH_PROMPT.match(text)
    if prompt is None or not _SEARCH_BODY.fullmatch(text[prompt.end() :]):
        return "the search is not in the format"
    return None


def _block_error(block: str, tags: Tags) -> str | None:
    outlines = re.findall(rf"{_joined(tags.outline[:1])}(\d+):", block)
    paths = re.findall(rf"{_joined(tags.header)}(\d+):", block)
    if outlines != [str(i + 1) for i in range(len(outlines))]:
        return f"outlines are numbered {outlines}"
    if paths != outlines:
        return f"paths are numbered {paths}, outlines {outlines}"
    winner = re.search(rf"{_joined(tags.after_join)}{_joined(tags.conclusion)}(\d+):{_joined(tags.end)}$", block)
    if winner and winner[1] not in paths:
        return f"the conclusion names path {winner[1]} of {len(paths)}"
    for label, restated in re.findall(rf"{_joined(tags.header)}(\d+):[^<]*{MARKER}(\d+):", block):
        if label != restated:
            return f"path {label} concludes as {restated}"
    return None


def _blocks(body: str, tags: Tags) -> Iterator[tuple[str, int]]:
    for match in re.finditer(_patterns(tags)[0], body):
        yield match[0], match.start()


def well_formed(text: str) -> bool:
    """Whether a flattened text has the format's structure, see `structure_error`."""
    return structure_error(text) is None


def parse_trace(text: str, searches: Sequence[str] = ()) -> Trace:
    """The trace behind a well-formed flattened text with its prompt; the inverse of `trace_text`.

    Args:
      searches: texts of APR's searches, prompts included, in the order of the calls.

    Raises:
      ValueError: a text is not well-formed, or has no prompt.
    """
    problem = structure_error(text) or next(filter(None, map(search_error, searches)), None)
    name, prompt, body = _split(text)
    if problem is not None or name is None:
        raise ValueError(problem or "the text has no prompt")
    body += EOS
    head = [BOS, *pieces_of(prompt)]
    if name == "apr":
        return tuple(_apr_parts(head, body, iter(searches)))
    if name == "sequential":
        return (Span((*head, *pieces_of(body)), len(head)),)
    return tuple(_parts(head, body, FORMATS[name]))


def pieces_of(text: str) -> tuple[str, ...]:
    """The pieces of a text in a format."""
    return tuple(_PIECE.findall(text))


def _parts(head: list[str], body: str, tags: Tags) -> Iterator[Span | Block]:
    trigger, before_fork = "".join(tags.trigger), "".join(tags.before_fork)
    branch = re.compile(_patterns(tags)[1])
    pieces, forced = head, len(head)
    while trigger in body:
        plan, _, body = body.partition(trigger)
        yield Span((*pieces, *pieces_of(plan + trigger)), forced)
        if before_fork:
            yield Span(tags.before_fork, len(tags.before_fork))
        body = body.removeprefix(before_fork)
        branches = []
        while match := branch.match(body):
            branches.append(_branch(match[0], tags))
            body = body[match.end() :]
        solved = (i for i, each in enumerate(branches) if NONE not in each[0].pieces)
        yield Block(tuple(branches), "prefill" if tags.join == "prefill" else "stitch", chosen=next(solved, None))
        pieces, forced = list(tags.after_join), len(tags.after_join)
        body = body.removeprefix("".join(tags.after_join))
    yield Span((*pieces, *pieces_of(body)), forced)


def _branch(text: str, tags: Tags) -> tuple[Span]:
    pieces = pieces_of(text)
    return (Span(pieces, forced=len(tags.header) + 1, kept=pieces.index(MARKER) + 1),)


def _apr_parts(head: list[str], body: str, searches: Iterator[str]) -> Iterator[Span | Block]:
    pieces, forced = head, len(head)
    while RETURNED in body:
        generated, _, body = body.partition(RETURNED)
        results, _, body = body.partition(END_RETURNED + "\n")
        yield Span((*pieces, *pieces_of(generated)), forced)
        nodes = re.findall(r"Generated Node #0,(\d+):", generated)
        starts = "".join(f"\n<Start Sub Search {i} at level 1> {NODES[int(node)]}" for i, node in enumerate(nodes))
        call = Span(pieces_of(f"{CALLING}{starts}\n<End Calling Sub Searches>"))
        called = tuple(_search(text) for _, text in zip(nodes, searches))
        yield Block(((call,),), "splice", called)
        pieces = [RETURNED, *pieces_of(results), END_RETURNED, "\n"]
        forced = len(pieces)
    yield Span((*pieces, *pieces_of(body)), forced)


def _search(text: str) -> Trace:
    text = text.removeprefix(BOS).removesuffix(EOS)
    prompt = _SEARCH_PROMPT.match(text)
    assert prompt is not None
    head = (BOS, *pieces_of(prompt[0]))
    return (Span((*head, *pieces_of(text[prompt.end() :]), EOS), len(head)),)
