"""How a Countdown search is written down, one token a piece: the lines of the search, and four formats of them.

    prompt      <multiverse> 22 26 31 53 -> 27        or <sequential>, <threadweaver>, <npr>
    opening      : 22 26 = 4 48 . . | 31 53 = 22 84 . . | 27 4 = 23 31 108 . ~ 22 22 84 . ;
    line         53 - 31 = 22
                 : 22 26 , 22 26 = 4 48 . . | 27 22 = 5 49 . . ~ 4 48 . . , 22 22 = ...

`x y = d s p q` is the quad of x and y: difference, sum, product, quotient; `.` where there is none (see
`countdown_search`). After `|` come the needed quads, compared with the made quad before them: after `~` stands, for
each needed value, the made value closest to it; if the two are equal, `!` follows and ends the line. (A small model
copies the closest value easily and then has two tokens at a fixed distance to compare; asked for a match alone, it
misses most.) A line begins with its step and, behind a line break, the other numbers left, then come three rounds, or,
where four values are left, what the last two make and the rounds of what the first two make.

Sequential: lines end with `;`, the first match ends the search, ` => equations` (or ` => none`) closes it. In the
others each block of lines behind a failed opening is forked:

    multiverse      ;<Parallel><Goal><Outline>1: 53 - 31</Outline>...</Goal>
                    <Path>1: 53 - 31 = 22\\n : ... => none</Path><Path>2: ... ! =>2: equations</Path>
                    <Conclusion>2:</Conclusion></Parallel>
    npr             ;<guideline>\\n<plan>1: 53 - 31</plan>\\n ... </guideline>\\n
                    <step>\\n1: ... => none</step><step>\\n2: ...</step><takeaway>\\n2:</takeaway>
    threadweaver   <think> ... ;<Parallel>\\n<Outlines>\\n<Outline>1: 53 - 31</Outline>...</Outlines>\\n
                    <Thread>\\n1: ... => none</Thread><Thread>\\n2: ...</Thread>\\n
                    <Conclusion>2:</Conclusion>\\n</Parallel> ... </think> => equations

where the conclusion names the first path that matched, or ` none`, upon which the next block follows. Where a thread
may not fork, its lines follow one another as in the sequential format. APR's texts are in `countdown_apr`.
"""

import dataclasses

from apr_jax.tasks.countdown import Equation, Problem
from apr_jax.tasks.countdown_search import Line, ReasoningTree, Round
from apr_jax.tasks.countdown_vocabulary import (
    BOS,
    EOS,
    LABELS,
    LEFT,
    MARKER,
    MATCH,
    MODES,
    NEAREST,
    NONE,
    number_pieces,
    numbers_pieces,
)
from apr_jax.tasks.trace import Block, Span, Trace


def format_prompt(problem: Problem, mode: str) -> str:
    """The prompt of a problem under a mode, a key of `MODES`."""
    return "".join(prompt_pieces(problem, mode))


def prompt_pieces(problem: Problem, mode: str) -> list[str]:
    return [MODES[mode], *numbers_pieces(problem.numbers), " ->", *number_pieces(problem.target)]


def step_pieces(step: Equation) -> list[str]:
    """` 53 - 31`, without its value."""
    return [*number_pieces(step.left), f" {step.operator}", *number_pieces(step.right)]


def equation_pieces(equations: tuple[Equation, ...]) -> list[str]:
    pieces = []
    for e in equations:
        pieces += [*step_pieces(e), " =", *number_pieces(e.value), " ,"]
    return pieces[:-1]


def _round(each: Round, made: bool) -> list[str]:
    pieces = [*numbers_pieces(each.pair), " =", *numbers_pieces(each.made)] if made else []
    pieces += [" |", *numbers_pieces((each.target, each.number)), " =", *numbers_pieces(each.needed)]
    pieces += [NEAREST, *numbers_pieces(each.nearest)]
    return pieces if each.slot is None else [*pieces, MATCH]


def body_pieces(line: Line) -> list[str]:
    """The rounds of a line."""
    if line.first is None:
        pieces = []
        for each in line.rounds:
            pieces += [*_round(each, made=True), " ,"]
        return pieces[:-1]
    pieces = [*numbers_pieces(line.values[:2]), " =", *numbers_pieces(line.first), " |"]
    for i, each in enumerate(line.rounds):
        pieces += _round(each, made=i == 0)
    return pieces


def line_pieces(line: Line) -> list[str]:
    """A line with its steps."""
    if not line.steps:
        return body_pieces(line)
    return [*_step_pieces(line, 0), *rest_pieces(line)]


def rest_pieces(line: Line) -> list[str]:
    """A line behind its first step."""
    pieces = [piece for i in range(1, len(line.steps)) for piece in _step_pieces(line, i)]
    return pieces + body_pieces(line)


def _step_pieces(line: Line, index: int) -> list[str]:
    """` 53 - 31 = 22\\n : 22 26 ,`: a step, and what is left beside its result."""
    step = line.steps[index]
    left = numbers_pieces(left_beside(line, index))
    return [*step_pieces(step), " =", *number_pieces(step.value), LEFT, *left, " ,"]


def left_beside(line: Line, index: int) -> tuple[int, ...]:
    """What is left behind step `index` beside its result, the problem's numbers first."""
    if index == len(line.steps) - 1:
        return line.values[:-1]
    values = list(line.values)
    for step in reversed(line.steps[index + 1 :]):
        values = [*values[:-1], step.left, step.right]
    values.remove(line.steps[index].value)
    return tuple(sorted(values))


def opening_pieces(tree: ReasoningTree) -> list[str]:
    return [LEFT, *line_pieces(tree.opening)]


def answer_pieces(solution: tuple[Equation, ...] | None) -> list[str]:
    return [MARKER, *(equation_pieces(solution) if solution else [NONE]), EOS]


def render_sequential(tree: ReasoningTree) -> Trace:
    """The search in one context, up to the first match."""
    prompt = [BOS, *prompt_pieces(tree.problem, "sequential")]
    pieces = [*prompt, *opening_pieces(tree)]
    if tree.opening.solution is None:
        for line in tree.lines[1:]:
            pieces += [" ;", *line_pieces(line)]
            if line.solution is not None:
                break
    return (Span((*pieces, *answer_pieces(tree.solution)), forced=len(prompt)),)


@dataclasses.dataclass(frozen=True)
class Tags:
    """What a format writes around the lines of a block, in pieces.

    Attributes:
      between: outlines. before_fork, header, after_join: forced by the engine, a header's label as well.
      begin: before the search. finish: before the answer.
    """

    mode: str
    plan: tuple[str, ...]
    outline: tuple[str, str]
    between: tuple[str, ...]
    trigger: tuple[str, ...]
    before_fork: tuple[str, ...]
    header: tuple[str, ...]
    closer: str
    after_join: tuple[str, ...]
    conclusion: tuple[str, ...]
    end: tuple[str, ...]
    join: str = "stitch"
    begin: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()


_MULTIVERSE = Tags(
    mode="multiverse",
    plan=("<Parallel>", "<Goal>"),
    outline=("<Outline>", "</Outline>"),
    between=(),
    trigger=("</Goal>",),
    before_fork=(),
    header=("<Path>",),
    closer="</Path>",
    after_join=("<Conclusion>",),
    conclusion=(),
    end=("</Conclusion>", "</Parallel>"),
)
_NPR = Tags(
    mode="npr",
    plan=("<guideline>", "\n"),
    outline=("<plan>", "</plan>"),
    between=("\n",),
    trigger=("\n", "</guideline>"),
    before_fork=("\n",),
    header=("<step>", "\n"),
    closer="</step>",
    after_join=("<takeaway>", "\n"),
    conclusion=(),
    end=("</takeaway>",),
)
_THREADWEAVER = Tags(
    mode="threadweaver",
    plan=("<Parallel>", "\n", "<Outlines>", "\n"),
    outline=("<Outline>", "</Outline>"),
    between=(),
    trigger=("</Outlines>",),
    before_fork=("\n",),
    header=("<Thread>", "\n"),
    closer="</Thread>",
    after_join=("\n",),
    conclusion=("<Conclusion>",),
    end=("</Conclusion>", "\n", "</Parallel>"),
    join="prefill",
    begin=("<think>",),
    finish=("</think>",),
)
FORMATS = {tags.mode: tags for tags in (_MULTIVERSE, _NPR, _THREADWEAVER)}


def render_blocks(tree: ReasoningTree, tags: Tags, max_forks: int | None = None) -> Trace:
    """The search with each block's lines side by side, up to the first block that holds a match.

    Args:
      max_forks: blocks beyond these are written as lines one after another, as a thread that may not fork has to.
    """
    prompt = [BOS, *prompt_pieces(tree.problem, tags.mode)]
    parts: list[Span | Block] = []
    pieces, forced = [*prompt, *tags.begin, *opening_pieces(tree)], len(prompt)
    for number, lines in enumerate(tree.blocks if tree.opening.solution is None else ()):
        won = next((i for i, line in enumerate(lines) if line.solution), None)
        if max_forks is not None and number >= max_forks:
            for line in lines if won is None else lines[: won + 1]:
                pieces += [" ;", *line_pieces(line)]
        else:
            pieces += [*([" ;"] if not parts else []), *tags.plan]
            for i, (label, line) in enumerate(zip(LABELS, lines, strict=False)):
                opened, closed = tags.outline
                pieces += [*(tags.between if i else ()), opened, label, *step_pieces(line.steps[0]), closed]
            parts.append(Span((*pieces, *tags.trigger), forced))
            if tags.before_fork:
                parts.append(Span(tags.before_fork, len(tags.before_fork)))
            branches = tuple((branch_span(label, line, tags),) for label, line in zip(LABELS, lines, strict=False))
            parts.append(Block(branches, "prefill" if tags.join == "prefill" else "stitch", chosen=won))
            winner = NONE if won is None else LABELS[won]
            pieces, forced = [*tags.after_join, *tags.conclusion, winner, *tags.end], len(tags.after_join)
        if won is not None:
            break
    return (*parts, Span((*pieces, *tags.finish, *answer_pieces(tree.solution)), forced))


def branch_span(label: str, line: Line, tags: Tags) -> Span:
    """A line as one branch of a block."""
    header = [*tags.header, label]
    explored = [*header, *line_pieces(line), MARKER]
    conclusion = [label, *equation_pieces(line.solution)] if line.solution else [NONE]
    return Span((*explored, *conclusion, tags.closer), forced=len(header), kept=len(explored))


def extract_answer(text: str) -> str | None:
    """What follows the last conclusion marker outside of any block; None if there is none."""
    for opened, closed in (("<Parallel>", "</Parallel>"), ("<guideline>", "</takeaway>")):
        text = text.rpartition(closed)[2]
        if opened in text:
            return None
    _, marker, answer = text.rpartition(MARKER.strip())
    return answer.removesuffix(EOS).strip() or None if marker else None
