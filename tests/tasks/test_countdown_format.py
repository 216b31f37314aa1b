"""Renderings, parsing and tokenizer: exact round trips, and structure errors by name."""

import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.tasks.countdown import Problem, check_equations, draw_problems, parse_equations
from apr_jax.tasks.countdown_features import initial_embedding
from apr_jax.tasks.countdown_format import (
    BOS,
    EOS,
    NUMBERS,
    RENDERINGS,
    extract_answer,
    format_prompt,
    number_piece,
    render_multiverse,
    render_sequential,
    vocabulary,
)
from apr_jax.tasks.countdown_parse import insert_paths, parse_trace, structure_error, well_formed
from apr_jax.tasks.countdown_search import search
from apr_jax.tasks.countdown_task import TASKS
from apr_jax.tasks.countdown_tokenizer import build_sentencepiece_model
from apr_jax.tasks.trace import Block, Span, critical_path, num_pieces, trace_spans, trace_text
from apr_jax.tokenizers import SentencePieceTokenizer

ASSETS = pathlib.Path(__file__).parents[2] / "apr_jax" / "assets" / "countdown"
EXAMPLE = Problem((22, 26, 31, 53), 27)
PROBLEMS = draw_problems(31, 60)
problems = st.builds(Problem, st.tuples(*[st.integers(1, 99)] * 4), st.integers(1, 100))


@settings(max_examples=150, deadline=None)
@given(problem=problems, program=st.sampled_from(sorted(RENDERINGS)))
def test_a_rendering_parses_back_to_itself(problem, program):
    tree = search(problem)
    trace = RENDERINGS[program](tree)
    text = trace_text(trace)
    assert structure_error(text) is None
    assert parse_trace(text) == trace
    assert {piece for span in trace_spans(trace) for piece in span.pieces} <= set(vocabulary())
    answer = extract_answer(text)
    if tree.solution is None:
        assert answer == "none"
    else:
        equations = parse_equations(answer or "")
        assert equations == list(tree.solution) and check_equations(problem, equations) is None


def test_both_renderings_write_the_same_lines():
    for problem in PROBLEMS:
        tree = search(problem)
        sequential, parallel = render_sequential(tree), render_multiverse(tree)
        assert extract_answer(trace_text(sequential)) == extract_answer(trace_text(parallel))
        paths = [branch for part in parallel if isinstance(part, Block) for branch in part.branches]
        assert bool(paths) == (tree.opening.solution is None)
        lines = trace_text(sequential).split(" ;")
        for path, line in zip(paths, lines[2:], strict=False):
            body = trace_text(path).removesuffix("</Path>").split(":", 1)[1].split(" =>")[0]
            assert body == line.split(" =>")[0]


def test_number_of_paths_adapts_to_the_problem():
    counts = {sum(isinstance(part, Block) for part in render_multiverse(search(p))) for p in PROBLEMS}
    assert counts == {0, 1, 2}
    for problem in PROBLEMS:
        trace = render_multiverse(search(problem))
        assert critical_path(trace) <= num_pieces(trace)
        assert num_pieces(trace) <= 1500


def test_prompt_is_what_the_engine_is_given_and_the_rest_is_marked():
    tree = search(EXAMPLE)
    for program, mode in (("sequential", "<sequential>"), ("multiverse", "<parallel>")):
        assert format_prompt(EXAMPLE, program) == f"{mode} 22 26 31 53 -> 27"
        first = next(iter(trace_spans(RENDERINGS[program](tree))))
        assert "".join(first.pieces[: first.forced]) == BOS + format_prompt(EXAMPLE, program)
    assert format_prompt(EXAMPLE, "best_of_n") == format_prompt(EXAMPLE, "sequential")
    hard = render_multiverse(search(Problem((11, 28, 94, 98), 92)))
    block = next(part for part in hard if isinstance(part, Block))
    for i, branch in enumerate(block.branches):
        (span,) = branch
        assert isinstance(span, Span)
        assert span.pieces[: span.forced] == ("<Path>", f"{i + 1}:") and span.pieces[-1] == "</Path>"
        assert span.kept is not None and span.pieces[span.kept - 1] == " =>"
    after = hard[-1]
    assert isinstance(after, Span) and after.pieces[: after.forced] == ("<Conclusion>",)


SOLVED = trace_text(render_multiverse(search(Problem((11, 28, 94, 98), 92))))


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("</Goal>", "", "not in the format"),
        (" ~ 66 66 66 !", " ~ 66 66 66", "not in the format"),
        (" ~ 66 66 66 !", " !", "not in the format"),
        ("<Conclusion>1:", "<Conclusion>9:", "names path 9"),
        ("<Outline>2:", "<Outline>3:", "outlines are numbered"),
        ("<Path>2:", "<Path>3:", "paths are numbered"),
        (" =>1:", " =>2:", "path 1 concludes as 2"),
        ("</Parallel> =>", "</Parallel> ; =>", "not in the format"),
        (" => 94 - 28 = 66 ,", " =>", "not in the format"),
    ],
)
def test_broken_structure_is_named(old, new, error):
    assert well_formed(SOLVED)
    assert old in SOLVED
    broken = SOLVED.replace(old, new)
    assert error in (structure_error(broken) or "")
    with pytest.raises(ValueError, match=error):
        parse_trace(broken)


def test_a_text_cut_short_is_not_well_formed():
    for problem in PROBLEMS[:10]:
        for render in RENDERINGS.values():
            pieces = [piece for span in trace_spans(render(search(problem))) for piece in span.pieces]
            for cut in range(8, len(pieces) - 2, 7):
                assert not well_formed("".join(pieces[:cut]))


def test_paths_are_put_back_between_goal_and_conclusion():
    blocks = [[trace_text(b) for b in part.branches] for part in parse_trace(SOLVED) if isinstance(part, Block)]
    root = "".join("".join(part.pieces) for part in parse_trace(SOLVED) if isinstance(part, Span))
    assert not well_formed(root)
    assert insert_paths(root, blocks) == SOLVED


def test_tokenizer_gives_one_token_a_piece(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(build_sentencepiece_model())
    assert path.read_bytes() == (ASSETS / "tokenizer.model").read_bytes()
    tokenizer = SentencePieceTokenizer(path)
    ids = {piece: i for i, piece in enumerate(vocabulary())}
    assert tokenizer.vocab_size == len(ids) == 256
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (ids[BOS], (ids[EOS],))
    for problem in PROBLEMS:
        for render in RENDERINGS.values():
            spans = list(trace_spans(render(search(problem))))
            pieces = [ids[piece] for span in spans for piece in span.pieces]
            text = trace_text(tuple(spans)).removeprefix(BOS).removesuffix(EOS)
            assert tokenizer.encode(text) == pieces[1:-1]
            assert tokenizer.decode(pieces) == text
    for tag in ("<Parallel>", "</Goal>", "<Path>", "</Path>", "<Conclusion>", "</Parallel>", " =>", "12:"):
        assert tokenizer.token_id(tag) == ids[tag]


def test_values_without_a_piece_are_refused():
    assert number_piece(None) == " ." and number_piece(199) == " 199"
    with pytest.raises(AssertionError, match="value 200 has no piece"):
        number_piece(200)


def test_wave_embeddings_are_unit_vectors_with_distinct_numbers():
    table = initial_embedding(128, 0)
    assert table.shape == (len(vocabulary()), 128)
    assert abs((table**2).sum(axis=1) - 1).max() < 1e-5
    first = vocabulary().index(NUMBERS[0])
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
    assert task.check(EXAMPLE, " : 22 => 53 - 31 = 22 , 22 / 22 = 1 , 26 + 1 = 27").correct
    assert task.check(EXAMPLE, " : 22").reason == "there is no answer"
    assert task.check(EXAMPLE, " : 22 => none").reason == "the search found nothing"
    wrong = task.check(EXAMPLE, " => 53 - 31 = 22 , 22 / 22 = 1 , 26 - 1 = 25")
    assert not wrong.correct and wrong.reason == "ends in 25, not in 27"
    unfinished = "<Parallel><Goal></Goal><Path>1: =>1: 1 + 2 = 3</Path>"
    assert task.check(EXAMPLE, unfinished).reason == "there is no answer"
