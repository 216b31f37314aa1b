"""What a join takes from the children: segments, the parent's next position, tokens to be computed again."""

from collections.abc import Sequence

from apr_jax.cache.cache import KVCache
from apr_jax.cache.context import Context, Segment, marked_segments, own_segments
from apr_jax.engine.thread import JoinMode, Thread


def flatten(thread: Thread) -> list[int]:
    """The thread's tokens with those of the children it joined, in reading order.

    Children whose returned text was spliced are left out: the parent's own tokens hold what they returned.
    Children that were not joined yet come last.
    """
    ids: list[int] = []
    at = 0
    for record in thread.joins:
        ids += thread.token_ids[at : record.at]
        at = record.at
        if record.mode != "splice":
            for child in record.children:
                ids += flatten(child)
    ids += thread.token_ids[at:]
    for child in thread.children:
        ids += flatten(child)
    return ids


def pages_wanted(cache: KVCache, children: Sequence[Thread], mode: JoinMode) -> int:
    """Pages of the segments that `join_parts` will give."""
    pick = marked_segments if mode == "conclusion" else own_segments
    return sum(cache.num_pages_of(pick(context)) for context in _contexts(children, mode))


def joined_len(thread: Thread, children: Sequence[Thread], mode: JoinMode) -> int:
    """Tokens that a join will add to the thread's context, before those that are forced on it then."""
    if mode == "splice":
        return 0
    lengths = []
    for child in children:
        assert child.context is not None
        pick = marked_segments if mode == "conclusion" else own_segments
        lengths.append(sum(s.num_tokens for s in pick(child.context)) + len(child.pending))
    if mode == "prefill":
        lengths[1:] = [len(flatten(child)) for child in children[1:]]
        repeated = 0
    else:
        repeated = len(thread.carried) * max(0, len(children) - 1)  # counted once for all children
    return sum(lengths) - repeated


def join_parts(
    cache: KVCache, thread: Thread, children: Sequence[Thread], mode: JoinMode
) -> tuple[list[list[Segment]], int, list[int]]:
    """What each child contributes: segments, the thread's next position, and tokens to be computed again.

    Seals the tails of the children whose segments are taken.
    """
    assert thread.context is not None
    position = thread.context.next_position
    contexts = _contexts(children, mode)
    for context in contexts:
        cache.seal(context)
    parts = [own_segments(context) for context in contexts]
    # Each child begins with the tokens that the fork carried; the first child's are enough.
    # A child that never ran may hand them on unfed.
    num_fed = [max(0, len(thread.carried) - child.num_to_seal) for child in children[: len(parts)]]
    firsts = [_split_at(part, n) for part, n in zip(parts, num_fed, strict=True)]
    if mode == "conclusion":
        ends = [marked_segments(context) for context in contexts]
        firsts = [(f, [s for s in rest if s in end]) for (f, rest), end in zip(firsts, ends, strict=True)]
    parts = [rest if i else first + rest for i, (first, rest) in enumerate(firsts)]
    if mode in ("select", "prefill"):
        position = contexts[0].next_position if contexts else position
    else:
        position = max([position, *(context.next_position for context in contexts)])
    again = [token for child in children[1:] for token in flatten(child)] if mode == "prefill" else []
    return parts, position, again


def _contexts(children: Sequence[Thread], mode: JoinMode) -> list[Context]:
    """The contexts that segments are taken from: `splice` takes none, `prefill` those of the first child."""
    taken = {"splice": children[:0], "prefill": children[:1]}.get(mode, children)
    contexts = [child.context for child in taken]
    assert None not in contexts
    return [context for context in contexts if context is not None]


def _split_at(segments: list[Segment], num_tokens: int) -> tuple[list[Segment], list[Segment]]:
    """The segments that hold the first num_tokens, and the rest; a segment's end lies there."""
    end = 0
    while num_tokens > 0:
        num_tokens -= segments[end].num_tokens
        end += 1
    assert num_tokens == 0, "carried tokens are sealed apart"
    return segments[:end], segments[end:]
