"""A family as text: children's tokens in their places between their parent's, as the formats are
published.
"""

import bisect

from apr_jax.engine.joining import flatten as flatten
from apr_jax.engine.thread import Thread
from apr_jax.tokenizers import Tokenizer


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
