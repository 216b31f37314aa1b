"""Reads texts in the Countdown format: is the structure right, and which trace is it?"""

import re
from collections.abc import Iterator, Sequence

from apr_jax.tasks.countdown_format import BOS, CONCLUSION_MARKER, EOS, MODES, vocabulary
from apr_jax.tasks.trace import Block, Span, Trace

_N, _S = r" \d{1,3}", r" (?:\d{1,3}|\.)"
_QUAD = rf"{_N}{_N} =(?:{_S}){{4}}"
_MISS, _MATCH = rf" \|{_QUAD} ~(?:{_S}){{4}}", rf" \|{_QUAD} ~(?:{_S}){{1,4}} !"
_SPLIT = rf" :{_QUAD} \|{_QUAD}"
_LEMMA_HEADING, _SPLIT_HEADING = rf"{_N} [-+*/]{_N}", rf"{_N}{_N} \|{_N}{_N}"
_HEADING = rf"(?:{_LEMMA_HEADING}|{_SPLIT_HEADING})"
_LEMMA, _ROUND = rf"{_LEMMA_HEADING} :(?:{_N}){{3}}", rf" ,{_QUAD}"
_OPENING_FAILED, _OPENING_SOLVED = rf"{_SPLIT}(?:{_MISS})+", rf"{_SPLIT}(?:{_MISS})*{_MATCH}"
_FAILED = rf"(?:{_LEMMA}(?:{_ROUND}{_MISS}){{3}}|{_SPLIT_HEADING}{_OPENING_FAILED})"
_SOLVED = rf"(?:{_LEMMA}(?:{_ROUND}{_MISS}){{0,2}}{_ROUND}{_MATCH}|{_SPLIT_HEADING}{_OPENING_SOLVED})"
_EQUATION = rf"{_N} [-+*/]{_N} ={_N}"
_EQUATIONS = rf"{_EQUATION}(?: ,{_EQUATION}){{2}}"
_NONE, _ANSWER = " => none", rf" =>{_EQUATIONS}"
_TARGETS = rf" ;(?:{_QUAD} ,){{3}}{_QUAD} ;"
_PATH = rf"<Path>\d+:(?:{_FAILED}{_NONE}|{_SOLVED} =>\d+:{_EQUATIONS})</Path>"
_OUTLINE = rf"<Outline>\d+:{_HEADING}</Outline>"
_BLOCK = rf"<Parallel><Goal>(?:{_OUTLINE})+</Goal>(?:{_PATH})+<Conclusion>(?:\d+:| none)</Conclusion></Parallel>"
_PROMPT = re.compile(rf"(?:{'|'.join(MODES.values())})(?:{_N}){{4}} ->{_N}")
_WHOLE = {
    "opening": re.compile(_OPENING_SOLVED + _ANSWER),
    "sequential": re.compile(rf"{_OPENING_FAILED}{_TARGETS}(?:{_FAILED} ;)*(?:{_SOLVED}{_ANSWER}|{_NONE})"),
    "multiverse": re.compile(rf"{_OPENING_FAILED}{_TARGETS}(?:{_BLOCK})+(?:{_ANSWER}|{_NONE})"),
}
_PIECE = re.compile("|".join(sorted(map(re.escape, vocabulary()), key=len, reverse=True)))


def structure_error(text: str) -> str | None:
    """What is wrong with a flattened text's structure; None if it is well-formed.

    Tags, labels and the shape of every line are checked, not the arithmetic.

    Args:
      text: all spans in reading order, paths where they were forked; with or without the prompt.
    """
    text = text.removeprefix(BOS).removesuffix(EOS)
    prompt = _PROMPT.match(text)
    body = text[prompt.end() :] if prompt else text
    if not any(pattern.fullmatch(body) for pattern in _WHOLE.values()):
        return "the text is not in the format"
    for block in re.findall("<Parallel>(.*?)</Parallel>", body):
        outlines, paths = (re.findall(rf"<{tag}>(\d+):", block) for tag in ("Outline", "Path"))
        if outlines != [str(i + 1) for i in range(len(outlines))]:
            return f"outlines are numbered {outlines}"
        if paths != outlines:
            return f"paths are numbered {paths}, outlines {outlines}"
        winner = re.search(r"<Conclusion>(\d+):", block)
        if winner and winner[1] not in paths:
            return f"the conclusion names path {winner[1]} of {len(paths)}"
        for label, restated in re.findall(r"<Path>(\d+):[^<]* =>(\d+):", block):
            if label != restated:
                return f"path {label} concludes as {restated}"
    return None


def well_formed(text: str) -> bool:
    """Whether a flattened text has the format's structure, see `structure_error`."""
    return structure_error(text) is None


def insert_paths(root_text: str, blocks: Sequence[Sequence[str]]) -> str:
    """The flattened text of a root whose paths are separate texts.

    Args:
      root_text: what the root holds, blocks without their paths.
      blocks: texts of the paths of every block, in order.
    """
    parts = root_text.split("</Goal>")
    flattened = parts[0]
    for i, part in enumerate(parts[1:]):
        flattened += "</Goal>" + "".join(blocks[i] if i < len(blocks) else ()) + part
    return flattened


def parse_trace(text: str) -> Trace:
    """The trace behind a well-formed flattened text; the inverse of `trace_text`.

    Raises:
      ValueError: the text is not well-formed, or has no prompt.
    """
    problem = structure_error(text)
    prompt = _PROMPT.match(text.removeprefix(BOS))
    if problem is not None or prompt is None:
        raise ValueError(problem or "the text has no prompt")
    whole = BOS + text.removeprefix(BOS).removesuffix(EOS) + EOS
    return tuple(_parts(whole, len(_pieces(BOS + prompt[0]))))


def _pieces(text: str) -> tuple[str, ...]:
    return tuple(_PIECE.findall(text))


def _parts(text: str, forced: int) -> Iterator[Span | Block]:
    while "</Goal>" in text:
        before, _, text = text.partition("</Goal>")
        paths, _, text = text.partition("<Conclusion>")
        yield Span(_pieces(before + "</Goal>"), forced)
        yield Block(tuple(_path(path) for path in re.findall("<Path>.*?</Path>", paths)))
        text, forced = "<Conclusion>" + text, 1
    yield Span(_pieces(text), forced)


def _path(text: str) -> Trace:
    pieces = _pieces(text)
    return (Span(pieces, forced=2, kept=pieces.index(CONCLUSION_MARKER) + 1),)
