"""A Countdown search in APR's text: a root calls searches of its nodes, each in a context of its own.

    root      Moving to Node #0
              Current State: 27:[22, 26, 31, 53], Operations: []
               : 22 26 = 4 48 . . | ... ;
              Generated Node #0,0: 27:[22, 26, 22] Operation: 53-31=22
              Generated Node #0,1: ...
    call      <Calling Sub Searches>
              <Start Sub Search 0 at level 1> Moving to Node #0,0
              <Start Sub Search 1 at level 1> Moving to Node #0,1
              <End Calling Sub Searches>
    search    Moving to Node #0,1
              Current State: 27:[...], Operations: ['...']
               : rounds as in the other formats
              27,27 equal: Goal Reached
              Moving to Node #0,1
              Operations: 53-31=22, ...
              27,27 equal: Goal Reached                         or, where nothing matched: No solution found.
    root      <Sub Searches>
              <No Solution in Sub Search 0 at level 1 at Node #0,0>
              <Goal Reached in Sub Search 1 at level 1 at Node #0,1>
              Moving to Node #0,1
              Operations: ...
              27,27 equal: Goal Reached
              <End Sub Searches>
               => equations

The prompt itself says that APR is meant. Nodes are numbered over all calls. Only the first match of a call is spliced
with its path, as its client does it for every search that reached the goal: those are all of them.

Source: Pan et al. 2025, Learning Adaptive Parallel Reasoning with Language Models (arXiv 2504.15466).
"""

from apr_jax.tasks.countdown import Equation, Problem
from apr_jax.tasks.countdown_format import answer_pieces, left_beside, opening_pieces, rest_pieces
from apr_jax.tasks.countdown_search import Line, ReasoningTree
from apr_jax.tasks.countdown_vocabulary import (
    BARE_NUMBERS,
    BOS,
    CALLS,
    END_OPERATIONS,
    EOS,
    FAILED,
    FIRST_GENERATED,
    GENERATED,
    GOALS,
    LEFT,
    LISTED,
    MADE_BY,
    MAX_TARGET,
    NO_OPERATIONS,
    NODE,
    NODES,
    NOTHING_FOUND,
    OPERATIONS,
    PATHS,
    REACHED,
    RESULTS,
    START,
    STATE,
    TARGETS,
)
from apr_jax.tasks.trace import Block, Span, Trace

CALLING, END_CALLING, RETURNED, END_RETURNED = CALLS


def root_prompt(problem: Problem) -> str:
    """The root's prompt. Raises ValueError: a target that has no piece of its own."""
    return "".join(root_pieces(problem))


def root_pieces(problem: Problem) -> list[str]:
    """The pieces of `root_prompt`."""
    if problem.target > MAX_TARGET:
        raise ValueError(f"target is {problem.target}, must be <= {MAX_TARGET} in APR's text")
    return [NODE, *_state(problem.target, problem.numbers), NO_OPERATIONS]


def _state(target: int, numbers: tuple[int, ...]) -> list[str]:
    """`Current State: 27:[22, 26, 31`, up to the bracket that closes the numbers."""
    return [STATE, *_listed(target, numbers)]


def _listed(target: int, numbers: tuple[int, ...]) -> list[str]:
    return [TARGETS[target], BARE_NUMBERS[numbers[0]], *(LISTED[number] for number in numbers[1:])]


def _equation(e: Equation) -> list[str]:
    return [BARE_NUMBERS[e.left], e.operator, BARE_NUMBERS[e.right], RESULTS[e.value]]


def _node_values(line: Line) -> tuple[int, ...]:
    """What is left at a line's node: behind its first step."""
    return (*left_beside(line, 0), line.steps[0].value)


def _path(index: int, line: Line) -> list[str]:
    """What a search that reached the goal returns."""
    assert line.solution is not None
    equations = []
    for i, e in enumerate(line.solution):
        pieces = _equation(e)
        equations += [LISTED[e.left], *pieces[1:]] if i else pieces
    return [PATHS[index], *equations, GOALS[line.target]]


def node_pieces(lines: tuple[Line, ...], first: int) -> list[str]:
    """The nodes of a block of lines, numbered from `first` on."""
    pieces = []
    for i, line in enumerate(lines, first):
        generated = FIRST_GENERATED[i] if i and i == first else GENERATED[i]
        pieces += [generated, *_listed(line.target, _node_values(line)), MADE_BY, *_equation(line.steps[0])]
    return pieces


def search_span(index: int, line: Line) -> Span:
    """The search of a line's node."""
    prompt = [BOS, NODES[index], *_state(line.target, _node_values(line)), OPERATIONS]
    prompt += [*_equation(line.steps[0]), END_OPERATIONS]
    pieces = [*prompt, LEFT, *rest_pieces(line)]
    if line.solution is None:
        pieces.append(NOTHING_FOUND)
    else:
        pieces += [GOALS[line.target], *_path(index, line)]
    return Span((*pieces, EOS), forced=len(prompt))


def returned_pieces(nodes: list[tuple[int, Line]]) -> list[str]:
    """What a call gives back: of each node's number and line."""
    pieces = [RETURNED]
    for i, line in nodes:
        pieces += [FAILED[i]] if line.solution is None else [REACHED[i], *_path(i, line)]
    return [*pieces, "\n", END_RETURNED, "\n"]


def render_apr(tree: ReasoningTree) -> Trace:
    """The search with each block's lines called as searches of their own.

    Raises:
      ValueError: a target that has no piece of its own.
    """
    prompt = [BOS, *root_pieces(tree.problem)]
    parts: list[Span | Block] = []
    pieces, forced, first = [*prompt, *opening_pieces(tree)], len(prompt), 0
    for lines in tree.blocks if tree.opening.solution is None else ():
        pieces += [" ;"] if not parts else []
        nodes = list(enumerate(lines, first))
        pieces += node_pieces(lines, first)
        parts.append(Span((*pieces, "\n"), forced))
        call = Span((CALLING, *(START[i] for i, _ in nodes), "\n", END_CALLING))
        searches = tuple((search_span(i, line),) for i, line in nodes)
        parts.append(Block(((call,),), "splice", searches))
        pieces = returned_pieces(nodes)
        forced, first = len(pieces), first + len(lines)
        if any(line.solution for line in lines):
            break
    return (*parts, Span((*pieces, *answer_pieces(tree.solution)), forced))
