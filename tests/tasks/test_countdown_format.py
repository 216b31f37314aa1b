"""Renderings, parsing and tokenizer: exact round trips, and structure errors by name."""

import pathlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.reasoning.grammars.apr import read_nodes, winning_path
from apr_jax.reasoning.programs import GRAMMARS
from apr_jax.tasks.countdown import Problem, check_equations, draw_problems, parse_equations
from apr_jax.tasks.countdown_arithmetic import count_equations
from apr_jax.tasks.countdown_features import initial_embedding
from apr_jax.tasks.countdown_format import FORMATS, extract_answer, render_blocks, render_sequential
from apr_jax.tasks.countdown_parse import parse_trace, search_error, structure_error, well_formed
from apr_jax.tasks.countdown_renderings import RENDERINGS, prompt_of
from apr_jax.tasks.countdown_search import BLOCK_SIZE, MAX_LINES, ReasoningTree, search
from apr_jax.tasks.countdown_task import TASKS
from apr_jax.tasks.countdown_tokenizer import build_sentencepiece_model
from apr_jax.tasks.countdown_vocabulary import (
    BARE_NUMBERS,
    BOS,
    EOS,
    MARKER,
    MAX_TARGET,
    NUMBERS,
    number_pieces,
    vocabulary,
)
from apr_jax.tasks.trace import Block, Span, Trace, critical_path, num_pieces, trace_spans, trace_text
from apr_jax.tokenizers import SentencePieceTokenizer

ASSETS = pathlib.Path(__file__).parents[2] / "apr_jax" / "assets" / "countdown"
EXAMPLE = Problem((22, 26, 31, 53), 27)
HARD = Problem((2, 2, 31, 31), 97)  # two blocks
PROBLEMS = [*draw_problems(31, 30), HARD]


@st.composite
def problems(draw) -> Problem:
    numbers = draw(st.lists(st.integers(1, 99), min_size=3, max_size=6))
    large = draw(st.booleans())
    return Problem(tuple(numbers), draw(st.integers(200, 999) if large else st.integers(1, 199)))


def blocks_of(trace: Trace) -> list[Block]:
    return [part for part in trace if isinstance(part, Block)]


def searches_of(trace: Trace) -> list[str]:
    return [trace_text(search) for block in blocks_of(trace) for search in block.searches]


def renderings(tree: ReasoningTree) -> dict[str, Trace]:
    """All that can write the problem: APR's text has no piece for targets above 100."""
    small = tree.problem.target <= MAX_TARGET
    return {name: render(tree) for name, render in RENDERINGS.items() if small or name != "apr"}


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_every_rendering_parses_back_to_itself(problem):
    tree = search(problem)
    for program, trace in renderings(tree).items():
        text = trace_text(trace)
        assert structure_error(text) is None, program
        assert parse_trace(text, searches_of(trace)) == trace
        assert {piece for span in trace_spans(trace) for piece in span.pieces} <= set(vocabulary())
        answer = extract_answer(text)
        if tree.solution is None:
            assert answer == "none"
        else:
            equations = parse_equations(answer or "")
            assert equations == list(tree.solution) and check_equations(problem, equations) is None


@settings(max_examples=20, deadline=None)
@given(problem=problems(), max_forks=st.integers(0, 3))
def test_what_may_not_fork_is_written_line_by_line(problem, max_forks):
    tree = search(problem)
    sequential = trace_text(render_sequential(tree)).partition("->")[2].removesuffix(EOS)
    for name, tags in FORMATS.items():
        trace = render_blocks(tree, tags, max_forks)
        text = trace_text(trace)
        assert structure_error(text) is None and parse_trace(text) == trace
        assert len(blocks_of(trace)) == min(max_forks, len(blocks_of(RENDERINGS[name](tree))))
        if max_forks == 0:
            plain = text.replace("<think>", "").replace("</think>", "").partition("->")[2].removesuffix(EOS)
            assert plain == sequential


def test_all_renderings_write_the_same_lines():
    for problem in PROBLEMS:
        tree = search(problem)
        sequential, *lines = trace_text(render_sequential(tree)).partition(MARKER)[0].split(" ;")
        opening = sequential.partition(str(problem.target))[2]
        for name in FORMATS:
            trace = RENDERINGS[name](tree)
            assert opening in trace_text(trace)
            paths = [trace_text(branch) for block in blocks_of(trace) for branch in block.branches]
            assert bool(paths) == (tree.opening.solution is None)
            for path, line in zip(paths, lines, strict=False):
                assert line == path.split(":", 1)[1].split(MARKER)[0]
        searches = searches_of(RENDERINGS["apr"](tree))
        for text, line in zip(searches, lines, strict=False):
            assert line.split(" ,", 1)[1] == re.split(r"\n(?=\w)", text.split("]\n :")[1])[0]


def test_paths_are_few_and_adapt_to_the_problem():
    counts = {len(blocks_of(RENDERINGS["multiverse"](search(p)))) for p in PROBLEMS}
    assert {0, 1, 2} <= counts
    for problem in PROBLEMS:
        for trace in renderings(search(problem)).values():
            assert critical_path(trace) <= num_pieces(trace) or searches_of(trace)
            assert all(len(block.branches) <= 5 and len(block.searches) <= 5 for block in blocks_of(trace))


def test_what_the_engine_forces_is_marked():
    tree = search(HARD)
    for name, tags in FORMATS.items():
        grammar = GRAMMARS[name]
        trace = RENDERINGS[name](tree)
        assert isinstance(trace[0], Span)
        assert "".join(trace[0].pieces[: trace[0].forced]) == BOS + prompt_of(HARD, name)
        for place, part in enumerate(trace):
            if isinstance(part, Span):
                continue
            before, after = trace[place - 1], trace[place + 1]
            assert isinstance(before, Span) and isinstance(after, Span)
            assert trace_text(trace[:place]).endswith(grammar.trigger + grammar.before_fork)
            assert "".join(before.pieces[: before.forced if grammar.before_fork else 0]) == grammar.before_fork
            assert "".join(after.pieces[: after.forced]) == grammar.after_join
            for label, branch in enumerate(part.branches, 1):
                (span,) = branch
                assert isinstance(span, Span) and span.kept is not None
                assert "".join(span.pieces[: span.forced]) == grammar.header.format(label=label)
                assert span.pieces[-1] == grammar.closer and span.pieces[span.kept - 1] == MARKER
        assert all(block.join == ("prefill" if grammar.join == "prefill" else "stitch") for block in blocks_of(trace))
        assert tags.mode == name
    assert prompt_of(EXAMPLE, "best_of_n") == "<sequential> 22 26 31 53 -> 27"


def test_searches_are_prompted_with_the_nodes_that_the_root_generated():
    trace = RENDERINGS["apr"](search(HARD))
    nodes = read_nodes(trace_text(trace))
    texts = searches_of(trace)
    assert len(texts) == len(nodes) - 1 == 10
    for (name, node), search_text in zip(list(nodes.items())[1:], texts, strict=True):
        assert search_text.startswith(f"{BOS}{node}\n :") and search_error(search_text) is None
        path = winning_path(search_text.removesuffix(EOS))
        outcome = "No Solution" if path is None else "Goal Reached"
        assert f"\n<{outcome} in Sub Search {int(name[2:]) % 5} at level 1 at Node #{name}>" in trace_text(trace)
        assert path is None or f">\n{path}\n" in trace_text(trace)
    assert sum(winning_path(text) is not None for text in texts) == 1


SOLVED = trace_text(RENDERINGS["multiverse"](search(HARD)))


@pytest.mark.parametrize(
    ("program", "old", "new", "error"),
    [
        ("multiverse", "</Goal>", "", "not in the format"),
        ("multiverse", " ~ 66 !", " ~ 66", "not in the format"),
        ("multiverse", " ~ 66 !", " !", "not in the format"),
        ("multiverse", "<Conclusion>2:", "<Conclusion>9:", "names path 9"),
        ("multiverse", "<Outline>2:", "<Outline>3:", "outlines are numbered"),
        ("multiverse", "<Path>2:", "<Path>3:", "paths are numbered"),
        ("multiverse", " =>2:", " =>1:", "path 2 concludes as 1"),
        ("multiverse", "</Parallel> =>", "</Parallel> ; =>", "not in the format"),
        ("npr", "</takeaway> =>", "</takeaway>\n =>", "not in the format"),
        ("npr", "<plan>2:", "<plan>3:", "outlines are numbered"),
        ("threadweaver", "</think>", "", "not in the format"),
        ("threadweaver", "<Thread>\n2:", "<Thread>\n3:", "paths are numbered"),
        ("apr", "<End Sub Searches>", "", "not in the format"),
        ("apr", "97:[2, 31, 33]", "97:[2 31 33]", "not in the format"),
        ("multiverse", " => 31 + 2 = 33 ,", " =>", "2 equations conclude 4 numbers"),
        ("sequential", " ; 31 / 31", " ; 31", "not in the format"),
    ],
)
def test_broken_structure_is_named(program, old, new, error):
    solved = trace_text(RENDERINGS[program](search(HARD)))
    assert well_formed(solved)
    assert old in solved
    broken = solved.replace(old, new)
    assert error in (structure_error(broken) or "")
    with pytest.raises(ValueError, match=error):
        parse_trace(broken)


def test_a_text_cut_short_is_not_well_formed():
    for problem in [*PROBLEMS[:5], HARD]:
        for render in RENDERINGS.values():
            pieces = [piece for span in trace_spans(render(search(problem))) for piece in span.pieces]
            for cut in range(8, len(pieces) - 2, 7):
                assert not well_formed("".join(pieces[:cut]))


def test_a_mode_does_not_pass_for_another():
    text = SOLVED.replace("<multiverse>", "<npr>")
    assert structure_error(text) == "the text is not in the format"
    assert structure_error(SOLVED.partition("97")[2]) is None  # without a prompt any format will do


def test_tokenizer_gives_one_token_a_piece(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(build_sentencepiece_model())
    assert path.read_bytes() == (ASSETS / "tokenizer.model").read_bytes()
    tokenizer = SentencePieceTokenizer(path)
    ids = {piece: i for i, piece in enumerate(vocabulary())}
    assert tokenizer.vocab_size == len(ids)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (ids[BOS], (ids[EOS],))
    for problem in [*PROBLEMS, Problem((3, 14, 78, 90, 97), 745)]:
        for program, trace in renderings(search(problem)).items():
            pieces = [ids[piece] for span in trace_spans(trace) for piece in span.pieces]
            text = trace_text(trace).removeprefix(BOS).removesuffix(EOS)
            assert tokenizer.decode(pieces) == text
            if program != "apr":
                assert tokenizer.encode(text) == pieces[1:-1]
        for span in trace_spans(RENDERINGS["apr"](search(HARD))):  # as the engine encodes: what is forced by itself
            forced = [ids[piece] for piece in span.pieces[: span.forced] if piece != BOS]
            assert tokenizer.encode(tokenizer.decode(forced), continuation=True) == forced
    for grammar in (GRAMMARS[name] for name in FORMATS):
        for tag in (*grammar.block, grammar.trigger, grammar.closer, MARKER):
            assert tokenizer.token_id(tag) == ids[tag]


def test_any_search_of_any_node_can_be_called_and_told_of(tmp_path):
    """A call that is dropped leaves a search whose number is not its node's."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(build_sentencepiece_model())
    tokenizer = SentencePieceTokenizer(path)
    for i in range(BLOCK_SIZE):
        for node in range(MAX_LINES):
            for line in ("Start Sub Search {} at level 1> Moving to Node #0,{}",
                         "No Solution in Sub Search {} at level 1 at Node #0,{}>",
                         "Goal Reached in Sub Search {} at level 1 at Node #0,{}>"):  # fmt: skip
                text = "\n<" + line.format(i, node)
                ids = tokenizer.encode(text, continuation=True)
                assert tokenizer.decode(ids) == text and len(ids) == (1 if node % BLOCK_SIZE == i else 2)


@settings(max_examples=30, deadline=None)
@given(problem=problems(), data=st.data())
def test_equations_are_counted_and_wrong_ones_found(problem, data):
    tree = search(problem)
    for program, trace in renderings(tree).items():
        texts = [trace_text((span,)) for span in trace_spans(trace)]
        num_equations, num_wrong = count_equations(problem, texts)
        assert num_wrong == 0, program
        if program == "sequential":
            stop = next((i for i, line in enumerate(tree.lines) if line.solution), len(tree.lines) - 1)
            quads = [quad for line in tree.lines[: stop + 1] for quad in quads_of(line)]
            steps = sum(len(line.steps) for line in tree.lines[: stop + 1]) + len(tree.solution or ())
            assert num_equations == steps + sum(value is not None for quad in quads for value in quad)
        text = "".join(texts)
        values = list(re.finditer(r"(?<= =)( \d+)(?= )", text))  # the first value behind a sign
        found = data.draw(st.sampled_from(values)) if values else None
        if found is not None:
            spoilt = f"{text[: found.start()]} {int(found[1]) + 1}{text[found.end() :]}"
            assert count_equations(problem, [spoilt]) == (num_equations, 1)


def quads_of(line) -> list:
    """All quads that a line writes."""
    if line.first is None:
        return [quad for each in line.rounds for quad in (each.made, each.needed)]
    return [line.first, line.rounds[0].made, *(each.needed for each in line.rounds)]


def test_large_values_are_a_number_and_a_digit():
    assert number_pieces(None) == [" ."] and number_pieces(199) == [" 199"] and number_pieces(200) == [" 20", "0"]
    with pytest.raises(ValueError, match="target is 101, must be <= 100"):
        prompt_of(Problem((3, 14, 78, 90), 101), "apr")


def test_wave_embeddings_are_unit_vectors_with_distinct_numbers():
    table = initial_embedding(128, 0)
    assert table.shape == (len(vocabulary()), 128)
    assert abs((table**2).sum(axis=1) - 1).max() < 1e-5
    for numbers in (NUMBERS, BARE_NUMBERS):
        first = vocabulary().index(numbers[0])
        similarity = table[first : first + 200] @ table[first : first + 200].T
        assert (similarity - 2 * (similarity > 0.999999)).max() < 0.95
    with pytest.raises(ValueError, match="must be >= 64"):
        initial_embedding(32, 0)


def test_task_judges_texts():
    task = TASKS["countdown"]
    assert task.problems(5, 1) == task.problems(9, 1)[:5]
    for program in RENDERINGS:
        assert task.problem_of(task.prompt(EXAMPLE, program)) == EXAMPLE
    assert task.problem_of("22 26 31 53 -> 27") == EXAMPLE
    assert task.problem_of("make 27 from 22") is None
    assert task.check(EXAMPLE, "\n : 22 => 53 - 31 = 22 , 22 / 22 = 1 , 26 + 1 = 27").correct
    assert task.check(EXAMPLE, "\n : 22").reason == "there is no answer"
    assert task.check(EXAMPLE, "\n : 22 => none").reason == "the search found nothing"
    wrong = task.check(EXAMPLE, " => 53 - 31 = 22 , 22 / 22 = 1 , 26 - 1 = 25")
    assert not wrong.correct and wrong.reason == "ends in 25, not in 27"
    for unfinished in ("<Parallel><Goal></Goal><Path>1: =>1: 1 + 2 = 3</Path>", "<guideline>\n<step>\n1: => 1 + 2 = 3"):
        assert task.check(EXAMPLE, unfinished).reason == "there is no answer"
