"""A family as text: children's tokens in their places between their parent's, as the formats are
published.
"""

import bisect
from collections.abc import Iterator

from apr_jax.engine.joining import flatten as flatten
from apr_jax.engine.thread import Thread
from apr_jax.tokenizers import Tokenizer


def chain(thread: Thread) -> Iterator[tuple[Thread, int, int]]:
    """What has been said from the prompt to the thread's end, joined children in their places: threads with half-open
    intervals of their own tokens.
    """
    if thread.parent is not None:
        yield from chain(thread.parent)
    yield from _own_pieces(thread)


def _own_pieces(thread: Thread) -> Iterator[tuple[Thread, int, int]]:
    start = 0
    for record in thread.joins:
        yield thread, start, record.at
        start = record.at
        if record.mode != "splice":
            for child in record.children:
                yield from _own_pieces(child)
    yield thread, start, len(thread.token_ids)


def chain_ids(thread: Thread) -> list[int]:
    """Token ids of the `chain`."""
    return [token for each, start, stop in chain(thread) for token in each.token_ids[start:stop]]


def find_blocks(thread: Thread, tokenizer: Tokenizer, block: tuple[str, str]) -> list[tuple[int, int]]:
    """Half-open intervals of the thread's own tokens from a block's opening tag to its closing one, for each
    join.

    A block without an opening tag begins at its join; one without a closing tag ends at the next join.
    """
    bounds = [0, *(record.at for record in thread.joins), len(thread.token_ids)]
    spans = []
    for start, at, stop in zip(bounds, bounds[1:], bounds[2:], strict=False):
        opened = _last_piece(thread.token_ids[start:at], tokenizer, block[0])
        closed = _first_piece_end(thread.token_ids[at:stop], tokenizer, block[1])
        spans.append((start + opened, at + closed))
    return spans


def _last_piece(ids: list[int], tokenizer: Tokenizer, piece: str) -> int:
    """Index of the token that the last occurrence of a piece begins in; len(ids) if there is none."""
    lengths = range(len(ids) + 1)
    shortest = bisect.bisect_left(lengths, True, key=lambda n: piece in tokenizer.decode(ids[len(ids) - n :]))
    return len(ids) - shortest if shortest <= len(ids) else len(ids)


def _first_piece_end(ids: list[int], tokenizer: Tokenizer, piece: str) -> int:
    """One more than the index of the token that the first occurrence ends in; len(ids) if there is none."""
    stops = range(len(ids) + 1)
    return min(len(ids), bisect.bisect_left(stops, True, key=lambda i: piece in tokenizer.decode(ids[:i])))
