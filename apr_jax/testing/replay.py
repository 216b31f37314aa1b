"""A finished family, replayed from its threads' tokens alone: what a dense forward pass over the whole tree needs.

Every token becomes an entry with a position and the set of entries it sees. Knows nothing of pages, segments or plans.
"""

import numpy as np

from apr_jax.engine.thread import JoinRecord, Thread


class Replay:
    """Entries of a family: token, position, what each sees, and which token must follow which entry.

    Args:
      marks: where each thread was marked last: its number of tokens then, by thread id.
    """

    def __init__(self, marks: dict[int, int]):
        self.marks = marks
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.sees: list[list[int]] = []
        self.sampled: list[tuple[int, int]] = []  # (entry it is sampled from, token)
        self.places: list[tuple[int, int]] = []  # of these: (thread id, index in its tokens)

    def add(self, token: int, position: int, context: list[int]) -> int:
        entry = len(self.tokens)
        self.tokens.append(token)
        self.positions.append(position)
        self.sees.append([*context, entry])
        return entry

    def write(self, ids: list[int], context: list[int], position: int) -> int:
        for token in ids:
            context.append(self.add(token, position, context))
            position += 1
        return position

    def thread(self, thread: Thread, context: list[int], position: int) -> tuple[list[int], int]:
        """Replays a thread; returns its context at the end and its next position."""
        position = self.write(thread.prompt_ids, context, position)
        own_from, marked_at = len(context), None
        joins = {record.at: record for record in thread.joins}
        for i, token in enumerate([*thread.token_ids, None]):
            if i in joins:
                position = self.join(joins[i], context, position)
            if self.marks.get(thread.id) == i:
                marked_at = len(context)
            if token is None:
                break
            if thread.sampled[i]:
                self.sampled.append((context[-1], token))
                self.places.append((thread.id, i))
            position = self.write([token], context, position)
        self.spans = (own_from, own_from if marked_at is None else marked_at)
        return context, position

    def join(self, record: JoinRecord, context: list[int], position: int) -> int:
        at_fork, fork_position = list(context), position
        for child in record.children:
            spawned = bool(child.prompt_ids)
            start = [] if spawned else list(at_fork)
            ended, end_position = self.thread(child, start, 0 if spawned else fork_position)
            own_from, marked_at = self.spans
            if record.mode in ("stitch", "select"):
                context += ended[own_from:]
            elif record.mode == "conclusion":
                context += ended[marked_at:]
            elif record.mode == "prefill":
                position = self.write([self.tokens[e] for e in ended[own_from:]], context, position)
            if record.mode in ("stitch", "conclusion", "select"):
                position = max(position, end_position) if record.mode != "select" else end_position
        return position

    def arrays(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, positions and mask of all entries, padded to a size that compiles once."""
        count = len(self.tokens)
        assert count <= size, f"{count} entries, room for {size}"
        tokens, positions, mask = np.zeros(size, np.int32), np.zeros(size, np.int32), np.eye(size, dtype=bool)
        tokens[:count], positions[:count] = self.tokens, self.positions
        for entry, sees in enumerate(self.sees):
            mask[entry, sees] = True
        return tokens, positions, mask
