"""What is trained is what is decoded: positions, masks and loss of packed rows against their definitions."""

import jax
import numpy as np
import pytest

from apr_jax.tasks.countdown import draw_problems
from apr_jax.tasks.countdown_format import RENDERINGS
from apr_jax.tasks.countdown_search import search
from apr_jax.tasks.trace import Block, Span, num_pieces
from apr_jax.train.countdown_data import PAD_ID, PIECE_IDS
from apr_jax.train.packing import batches, flatten, pack, stack, visible

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
    """Both renderings of some problems."""
    trees = [search(problem) for problem in draw_problems(41, count)]
    return [render(tree) for tree in trees for render in RENDERINGS.values()]


def definition(trace, join: str):
    """Tokens with position, whether sampled, (block, branch) or None, whether `conclusion` drops them."""
    position, entries = 0, []
    for block, part in enumerate(trace):
        if isinstance(part, Span):
            for i, piece in enumerate(part.pieces):
                entries.append((piece, position, i >= part.forced, None, False))
                position += 1
        else:
            ends = []
            for number, branch in enumerate(part.branches):
                at = position
                for span in branch:
                    for i, piece in enumerate(span.pieces):
                        dropped = join == "conclusion" and span.kept is not None and i < span.kept
                        entries.append((piece, at, i >= span.forced, (block, number), dropped))
                        at += 1
                ends.append(at)
            position = max(ends)
    return entries


def sees(query, key) -> bool:
    """Multiverse's mask between two entries, the key not later than the query."""
    same_branch = query[3] == key[3]
    siblings = query[3] is not None and key[3] is not None and query[3][0] == key[3][0] and not same_branch
    return not siblings and (same_branch or not key[4])


@pytest.mark.parametrize("join", ["stitch", "conclusion"])
def test_rows_follow_the_definition(join):
    cases = [(SMALL, IDS)] + [(trace, PIECE_IDS) for trace in traces(8)]
    assert {sum(isinstance(part, Block) for part in trace) for trace, _ in cases} == {0, 1, 2}
    for trace, ids in cases:
        entries, row = definition(trace, join), flatten(trace, ids.__getitem__, join)
        assert len(row) == num_pieces(trace) == len(entries)
        assert [ids[e[0]] for e in entries] == row.tokens.tolist()
        assert [e[1] for e in entries] == row.positions.tolist()
        assert [float(e[2]) for e in entries[1:]] + [0.0] == row.loss.tolist()
        mask = np.asarray(visible(row.end, row.hide_from, row.hide_to))
        for q in range(len(row)):
            assert mask[q].tolist() == [k <= q and sees(entries[q], entries[k]) for k in range(len(row))]


def test_small_example_by_hand():
    row = flatten(SMALL, IDS.__getitem__)
    first = [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 9, 10, 11]
    assert row.positions.tolist() == [*first, 12, 13, 14, 12, 13, 14, 15, 16, 17, 18, 19]
    assert row.loss.tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0]
    last = np.asarray(visible(row.end, row.hide_from, row.hide_to))[-1]
    assert last.all()
    conclusion = flatten(SMALL, IDS.__getitem__, "conclusion")
    last = np.asarray(visible(conclusion.end, conclusion.hide_from, conclusion.hide_to))[-1]
    assert [i for i in range(26) if not last[i]] == [4, 5, 6, 7, 18, 19, 20, 21, 22]


def test_flatten_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'prefill'"):
        flatten(SMALL, IDS.__getitem__, "prefill")
    nested = (Span(("a",)), Block(((Span(("b",)), Block(((Span(("c",)),),))),)))
    with pytest.raises(ValueError, match="block inside a branch"):
        flatten(nested, IDS.__getitem__)


def test_packed_rows_keep_every_trace_and_its_mask():
    rows = [flatten(trace, PIECE_IDS.__getitem__) for trace in traces(15)]
    packed = pack(rows, [512, 1152], PAD_ID)
    placed = sorted(
        tuple(row.tokens[start:end].tolist())
        for bins in packed.values()
        for row in bins
        for start, end in sorted({(int(np.argmax(row.end == e)), int(e)) for e in row.end})
        if row.tokens[start] != PAD_ID
    )
    assert placed == sorted(tuple(row.tokens.tolist()) for row in rows)
    for length, bins in packed.items():
        for row in bins:
            assert len(row) == length
            mask = np.asarray(visible(row.end, row.hide_from, row.hide_to))
            assert mask.diagonal().all()
            padding = row.tokens == PAD_ID
            assert (mask[padding].sum(axis=1) == 1).all() and (mask[:, padding].sum(axis=0) == 1).all()
            assert (row.loss[padding] == 0).all()
            for start, end in {(int(np.argmax(row.end == e)), int(e)) for e in row.end[~padding]}:
                own = next(r for r in rows if r.tokens.tolist() == row.tokens[start:end].tolist())
                assert (mask[start:end, start:end] == visible(own.end, own.hide_from, own.hide_to)).all()
                assert not mask[start:end, :start].any() and not mask[end:, start:end].any()
                assert (row.positions[start:end] == own.positions).all()
                assert (row.loss[start:end] == own.loss).all()
    with pytest.raises(ValueError, match="does not fit rows of at most 64"):
        pack(rows, [32, 64], PAD_ID)


def test_steps_hold_every_row_once_and_padding_for_the_rest():
    rows = [flatten(trace, PIECE_IDS.__getitem__) for trace in traces(15)]
    packed = pack(rows, [512, 1152], PAD_ID)
    steps = batches(packed, {512: 3, 1152: 2}, PAD_ID)
    for length, count in ((512, 3), (1152, 2)):
        assert all(step[length]["tokens"].shape == (count, length) for step in steps)
        found = [row for step in steps for row in step[length]["tokens"].tolist() if row != [PAD_ID] * length]
        assert sorted(found) == sorted(row.tokens.tolist() for row in packed[length])


def test_mask_is_built_alike_under_vmap():
    rows = [flatten(trace, PIECE_IDS.__getitem__) for trace in traces(4)]
    arrays = stack(pack(rows, [1152], PAD_ID)[1152])
    masks = jax.vmap(visible)(arrays["end"], arrays["hide_from"], arrays["hide_to"])
    for i in range(len(masks)):
        assert (masks[i] == visible(*(arrays[name][i] for name in ("end", "hide_from", "hide_to")))).all()
