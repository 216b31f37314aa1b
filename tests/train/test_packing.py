"""What is trained is what is decoded: positions, masks and loss of packed rows against their definitions."""

import itertools

import jax
import numpy as np
import pytest

from apr_jax.tasks.countdown import Problem, draw_problems
from apr_jax.tasks.countdown_renderings import RENDERINGS
from apr_jax.tasks.countdown_search import search
from apr_jax.tasks.trace import Block, Span
from apr_jax.train.countdown_data import PAD_ID, PIECE_IDS
from apr_jax.train.packing import JOINS, batches, flatten, pack, stack, visible

SMALL = (
    Span(("p", "q", "a", "<g>"), forced=2),
    Block(((Span(("<P>", "1:", "x", "=>", "y"), 2, kept=4),), (Span(("<P>", "2:", "z"), 2),))),
    Span(("<C>", "b", "<g>"), forced=1),
    Block(((Span(("<P>", "1:", "u"), 2),), (Span(("<P>", "2:", "v", "w", "=>", "s"), 2, kept=5),))),
    Span(("<C>", "c"), forced=1),
)
PIECES = ("p", "q", "a", "b", "c", "<g>", "<P>", "1:", "2:", "x", "y", "z", "u", "v", "w", "s", "=>", "<C>")
IDS = {piece: i for i, piece in enumerate(PIECES)}


def traces(count: int):
    """All renderings of some problems, one of them with two blocks."""
    trees = [search(problem) for problem in [Problem((2, 2, 31, 31), 97), *draw_problems(41, count)]]
    return [render(tree) for tree in trees for render in RENDERINGS.values()]


def definition(trace, join: str = "stitch"):
    """What each token of a trace sees, written from what the programs do, one list a thread.

    Yields (thread, token, position, whether it is learned, its context as (token, position) pairs), tokens of the
    root and its branches in the order of the row; searches come last.
    """
    seen: list[tuple[str, int]] = []
    position = 0
    for number, part in enumerate(trace):
        if isinstance(part, Span):
            for i, piece in enumerate(part.pieces):
                seen.append((piece, position))
                yield "root", piece, position, i >= part.forced, list(seen)
                position += 1
            continue
        ends, kept = [], []
        for ordinal, branch in enumerate(part.branches):
            own, start = list(seen), len(seen)
            for span in branch:
                first = len(own)
                for i, piece in enumerate(span.pieces):
                    own.append((piece, position + len(own) - start))
                    yield (number, ordinal), piece, own[-1][1], i >= span.forced, list(own)
                start_kept = start if span.kept is None else first + span.kept
            ends.append(position + len(own) - start)
            can_drop = join == "conclusion" and part.join == "stitch"
            marked = can_drop and any(span.kept is not None for span in branch)
            kept.append(own[start_kept:] if marked else own[start:])
        if part.join == "stitch":
            taken = range(len(kept)) if join != "first" or part.chosen is None else [part.chosen]
            seen += [entry for i in taken for entry in kept[i]]
            position = max(ends[i] for i in taken)
        elif part.join == "prefill":
            for ordinal, branch in enumerate(kept):
                for piece, _ in branch:
                    seen.append((piece, position))
                    position += 1
                    if ordinal:
                        yield "again", piece, position - 1, False, list(seen)
    for search_trace in (each for part in trace if isinstance(part, Block) for each in part.searches):
        yield from (("search", *entry[1:]) for entry in definition(search_trace))


@pytest.mark.parametrize("join", JOINS)
def test_rows_follow_the_definition(join):
    cases = [(SMALL, IDS)] + [(trace, PIECE_IDS) for trace in traces(2)]
    assert {part.join for trace, _ in cases for part in trace if isinstance(part, Block)} == {
        "stitch",
        "prefill",
        "splice",
    }
    for trace, ids in cases:
        entries, rows = list(definition(trace, join)), flatten(trace, ids.__getitem__, join)
        assert sum(map(len, rows)) == len(entries)
        for row in rows:
            own, entries = entries[: len(row)], entries[len(row) :]
            assert [ids[e[1]] for e in own] == row.tokens.tolist()
            assert [e[2] for e in own] == row.positions.tolist()
            assert [float(e[3]) for e in own[1:]] + [0.0] == row.loss.tolist()
            mask = np.asarray(visible(row.end, row.hide_from, row.hide_to))
            for q in range(len(row)):
                keys = np.flatnonzero(mask[q])
                found = sorted(zip(row.tokens[keys].tolist(), row.positions[keys].tolist(), strict=True))
                assert found == sorted((ids[piece], position) for piece, position in own[q][4])


def test_small_example_by_hand():
    (row,) = flatten(SMALL, IDS.__getitem__)
    first = [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 9, 10, 11]
    assert row.positions.tolist() == [*first, 12, 13, 14, 12, 13, 14, 15, 16, 17, 18, 19]
    assert row.loss.tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0]
    last = np.asarray(visible(row.end, row.hide_from, row.hide_to))[-1]
    assert last.all()
    (conclusion,) = flatten(SMALL, IDS.__getitem__, "conclusion")
    last = np.asarray(visible(conclusion.end, conclusion.hide_from, conclusion.hide_to))[-1]
    assert [i for i in range(26) if not last[i]] == [4, 5, 6, 7, 18, 19, 20, 21, 22]


def test_flatten_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'prefill'"):
        flatten(SMALL, IDS.__getitem__, "prefill")
    nested = (Span(("a",)), Block(((Span(("b",)), Block(((Span(("c",)),),))),)))
    with pytest.raises(ValueError, match="block inside a branch"):
        flatten(nested, IDS.__getitem__)


def test_packed_rows_keep_every_trace_and_its_mask():
    rows = [row for trace in traces(6) for row in flatten(trace, PIECE_IDS.__getitem__)]
    packed = pack(rows, [512, 2560], PAD_ID)
    placed = []
    for length, bins in packed.items():
        for row in bins:
            assert len(row) == length
            mask = np.asarray(visible(row.end, row.hide_from, row.hide_to))
            assert mask.diagonal().all()
            padding = row.tokens == PAD_ID
            assert (mask[padding].sum(axis=1) == 1).all() and (mask[:, padding].sum(axis=0) == 1).all()
            assert (row.loss[padding] == 0).all()
            starts = [*np.flatnonzero(row.tokens == PIECE_IDS["<bos>"]).tolist(), int((~padding).sum())]
            for start, end in itertools.pairwise(starts):
                placed.append(tuple(row.tokens[start:end].tolist()))
                own = next(r for r in rows if r.tokens.tolist() == list(placed[-1]))
                assert (mask[start:end, start:end] == visible(own.end, own.hide_from, own.hide_to)).all()
                assert not mask[start:end, :start].any() and not mask[end:, start:end].any()
                assert (row.positions[start:end] == own.positions).all()
                assert (row.loss[start:end] == own.loss).all()
    assert sorted(placed) == sorted(tuple(row.tokens.tolist()) for row in rows)
    with pytest.raises(ValueError, match="does not fit rows of at most 64"):
        pack(rows, [32, 64], PAD_ID)


def test_steps_hold_every_row_once_and_padding_for_the_rest():
    rows = [row for trace in traces(6) for row in flatten(trace, PIECE_IDS.__getitem__)]
    packed = pack(rows, [512, 2560], PAD_ID)
    steps = batches(packed, {512: 3, 2560: 2}, PAD_ID)
    for length, count in ((512, 3), (2560, 2)):
        assert all(step[length]["tokens"].shape == (count, length) for step in steps)
        found = [row for step in steps for row in step[length]["tokens"].tolist() if row != [PAD_ID] * length]
        assert sorted(found) == sorted(row.tokens.tolist() for row in packed[length])


def test_mask_is_built_alike_under_vmap():
    rows = [row for trace in traces(1) for row in flatten(trace, PIECE_IDS.__getitem__)]
    arrays = stack(pack(rows, [2560], PAD_ID)[2560])
    masks = jax.vmap(visible)(arrays["end"], arrays["hide_from"], arrays["hide_to"])
    for i in range(len(masks)):
        assert (masks[i] == visible(*(arrays[name][i] for name in ("end", "hide_from", "hide_to")))).all()
