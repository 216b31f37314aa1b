"""How a Countdown search is written down: one token a piece, in one context or as Multiverse blocks.

    prompt      <parallel> 22 26 31 53 -> 27          or <sequential> ...
    opening      : 22 26 = 4 48 . . | 31 53 = 22 84 . . | 27 4 = 23 31 108 . ~ 22 22 84 . ;
    targets      27 22 = 5 49 . . , 27 26 = 1 53 . . , 27 31 = 4 58 . . , 27 53 = 26 80 . . ;

`x y = d s p q` is the quad of x and y: difference, sum, product, quotient; `.` where there is none (see
`countdown_search`). After `|` come the needed quads, compared with the made quad before them: after `~` stands, for
each needed value, the made value closest to it; if the two are equal, `!` follows and ends the line. (A small model
copies the closest value easily and then has two tokens at a fixed distance to compare; asked for a match alone, it
misses most.) A line of the search is a lemma, headed by its closing equation without the target and the three
numbers left, or a split:

    lemma        53 - 26 : 22 26 31 , 26 31 = 5 57 . . | 26 22 = 4 48 . . ~ 5 57 . . , 22 31 = 9 53 . . | 26 26 ...
    split        22 31 | 26 53 : 22 31 = 9 53 . . | 26 53 = 27 79 . . | 27 9 = 18 36 . 3 ~ 27 27 ...

Sequential: lines end with `;`, the first match ends the search, ` => equations` (or ` => none`) closes it.
Parallel: after a failed opening and the targets, each block of the search is forked,

    <Parallel><Goal><Outline>1: 53 - 26</Outline><Outline>2: 31 - 4</Outline>...</Goal>
    <Path>1: 53 - 26 : 22 26 31 , ... => none</Path><Path>2: ... ! =>2: equations</Path>...
    <Conclusion>2:</Conclusion></Parallel>

where the conclusion names the first path that matched, or ` none`, upon which the next block follows.
"""

from apr_jax.tasks.countdown import Equation, Problem
from apr_jax.tasks.countdown_search import MAX_VALUE, Line, ReasoningTree, Round, quad
from apr_jax.tasks.trace import Block, Span, Trace

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
CONTROLS = (UNK, BOS, EOS, PAD)  # ids 0 to 3
MODES = {"sequential": "<sequential>", "multiverse": "<parallel>"}
TAGS = ("<Parallel>", "</Parallel>", "<Goal>", "</Goal>", "<Outline>", "</Outline>", "<Path>", "</Path>",
        "<Conclusion>", "</Conclusion>")  # fmt: skip
MAX_PATHS = 24
LABELS = tuple(f"{i}:" for i in range(1, MAX_PATHS + 1))
SIGNS = (" :", " =", " |", " ,", " ;", " !", " =>", " ->", " .", " -", " +", " *", " /", " none")
NEAREST = " ~"
NUMBERS = tuple(f" {n}" for n in range(MAX_VALUE + 1))
RESERVED = ("<reserved_0>",)  # makes 256
CONCLUSION_MARKER = " =>"
MATCH = " !"


def vocabulary() -> tuple[str, ...]:
    """All pieces in the order of their ids; a leading space is part of the piece."""
    return (*CONTROLS, *MODES.values(), *TAGS, *LABELS, *SIGNS, *NUMBERS, NEAREST, *RESERVED)


def number_piece(value: int | None) -> str:
    """The piece of a value, ` .` for None."""
    if value is None:
        return " ."
    assert 0 <= value <= MAX_VALUE, f"value {value} has no piece, must be in [0, {MAX_VALUE}]"
    return NUMBERS[value]


def format_prompt(problem: Problem, program: str) -> str:
    """The prompt of a problem.

    Args:
      program: "sequential" or "multiverse"; any other program gets the sequential rendering.
    """
    return "".join(_prompt_pieces(problem, program))


def _prompt_pieces(problem: Problem, program: str) -> list[str]:
    numbers = [number_piece(n) for n in problem.numbers]
    return [MODES.get(program, MODES["sequential"]), *numbers, " ->", number_piece(problem.target)]


def _quad(x: int, y: int) -> list[str]:
    return [number_piece(x), number_piece(y), " =", *map(number_piece, quad(x, y))]


def _needed(each: Round) -> list[str]:
    pieces = [" |", *_quad(each.target, each.number), NEAREST, *map(number_piece, each.nearest)]
    return pieces if each.slots is None else [*pieces, MATCH]


def _heading(line: Line) -> list[str]:
    if line.last is not None:
        return [number_piece(line.last.left), f" {line.last.operator}", number_piece(line.last.right)]
    assert line.first is not None
    first, second = ([number_piece(n) for n in pair] for pair in (line.first, line.rest))
    return [*first, " |", *second]


def _split_body(line: Line) -> list[str]:
    assert line.first is not None
    pieces = [" :", *_quad(*line.first), " |", *_quad(*line.rounds[0].pair)]
    return pieces + [piece for each in line.rounds for piece in _needed(each)]


def _line(line: Line) -> list[str]:
    if line.first is not None:
        return _heading(line) + _split_body(line)
    pieces = [*_heading(line), " :", *(number_piece(n) for n in line.rest)]
    for each in line.rounds:
        pieces += [" ,", *_quad(*each.pair), *_needed(each)]
    return pieces


def _targets(problem: Problem) -> list[str]:
    pieces = []
    for number in problem.numbers:
        pieces += [*_quad(problem.target, number), " ,"]
    return [*pieces[:-1], " ;"]


def _equations(equations: tuple[Equation, ...]) -> list[str]:
    pieces = []
    for e in equations:
        left, right, value = map(number_piece, (e.left, e.right, e.value))
        pieces += [left, f" {e.operator}", right, " =", value, " ,"]
    return pieces[:-1]


def _answer(solution: tuple[Equation, ...] | None) -> list[str]:
    return [CONCLUSION_MARKER, *(_equations(solution) if solution else [" none"]), EOS]


def render_sequential(tree: ReasoningTree) -> Trace:
    """The search in one context, up to the first match."""
    prompt = [BOS, *_prompt_pieces(tree.problem, "sequential")]
    pieces = [*prompt, *_split_body(tree.opening)]
    if tree.opening.solution is None:
        pieces += [" ;", *_targets(tree.problem)]
        for line in (line for block in tree.blocks for line in block):
            pieces += _line(line)
            if line.solution is not None:
                break
            pieces.append(" ;")
    return (Span((*pieces, *_answer(tree.solution)), forced=len(prompt)),)


def render_multiverse(tree: ReasoningTree) -> Trace:
    """The same search with each block's lines side by side, up to the first block that holds a match."""
    prompt = [BOS, *_prompt_pieces(tree.problem, "multiverse")]
    if tree.opening.solution is not None:
        pieces = (*prompt, *_split_body(tree.opening), *_answer(tree.solution))
        return (Span(pieces, forced=len(prompt)),)
    parts: list[Span | Block] = []
    pieces, forced = [*prompt, *_split_body(tree.opening), " ;", *_targets(tree.problem)], len(prompt)
    for lines in tree.blocks:
        pieces += ["<Parallel>", "<Goal>"]
        for label, line in zip(LABELS, lines, strict=False):
            pieces += ["<Outline>", label, *_heading(line), "</Outline>"]
        parts.append(Span((*pieces, "</Goal>"), forced))
        parts.append(Block(tuple(_path(label, line) for label, line in zip(LABELS, lines, strict=False))))
        winner = next((label for label, line in zip(LABELS, lines, strict=False) if line.solution), None)
        pieces, forced = ["<Conclusion>", winner or " none", "</Conclusion>", "</Parallel>"], 1
        if winner:
            break
    return (*parts, Span((*pieces, *_answer(tree.solution)), forced))


def _path(label: str, line: Line) -> Trace:
    explored = ["<Path>", label, *_line(line), CONCLUSION_MARKER]
    conclusion = [label, *_equations(line.solution)] if line.solution else [" none"]
    return (Span((*explored, *conclusion, "</Path>"), forced=2, kept=len(explored)),)


RENDERINGS = {"sequential": render_sequential, "multiverse": render_multiverse}


def extract_answer(text: str) -> str | None:
    """What follows the last conclusion marker outside of any block; None if there is none."""
    after_blocks = text.rpartition("</Parallel>")[2]
    _, marker, answer = after_blocks.rpartition("=>")
    if not marker or "<Parallel>" in after_blocks:
        return None
    return answer.removesuffix(EOS).strip() or None
