"""What the engine says equals the argmax of one dense forward pass over the whole tree, mask and positions explicit.

The oracle replays a finished family from its threads' tokens alone: every token becomes an entry with a position and
the set of entries it sees. It knows nothing of pages, segments or plans.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenarios import Family, drive

from apr_jax.config import CacheConfig, EngineConfig
from apr_jax.engine.engine import EngineCore
from apr_jax.engine.thread import Thread
from apr_jax.models.dense import dense_logits
from apr_jax.testing import byte_tokenizer, tiny_config, tiny_decoder

MODEL = tiny_config(vocab_size=40, eos_ids=(0,), max_position=2048)
PADDED = 1024


class Replay:
    """Entries of a family: token, position, what each sees, and which token must follow which entry."""

    def __init__(self, marks: dict[int, int]):
        self.marks = marks
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.sees: list[list[int]] = []
        self.sampled: list[tuple[int, int]] = []  # (entry it is sampled from, token)

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
            position = self.write([token], context, position)
        self.spans = (own_from, own_from if marked_at is None else marked_at)
        return context, position

    def join(self, record, context: list[int], position: int) -> int:
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


@pytest.mark.slow
def test_greedy_tokens_are_the_dense_argmax():
    with jax.enable_x64(True):
        decoder = tiny_decoder(MODEL, 1, jnp.float64)
        engine = EngineCore(
            MODEL,
            decoder,
            byte_tokenizer(),
            cache_config=CacheConfig(page_size=8, num_pages=400),
            engine_config=EngineConfig(
                dtype="float64", max_threads=8, steps_per_dispatch=8, prefill_chunk=32, max_tail_pages=4
            ),
        )
        families = [Family(seed, 40, greedy=True) for seed in range(100, 124)]
        drive(engine, families)
        forward = jax.jit(lambda tokens, positions, mask: dense_logits(decoder, tokens, positions, mask))
        checked = 0
        for family in families:
            replay = Replay(family.marks)
            replay.thread(family.root, [], 0)
            count = len(replay.tokens)
            assert count <= PADDED, f"{count} entries: make PADDED larger"
            mask = np.eye(PADDED, dtype=bool)
            for entry, sees in enumerate(replay.sees):
                mask[entry, sees] = True
            padded = np.zeros((2, PADDED), np.int32)
            padded[0, :count], padded[1, :count] = replay.tokens, replay.positions
            best = np.asarray(forward(padded[0], padded[1], mask)).argmax(-1)
            for entry, token in replay.sampled:
                assert best[entry] == token, f"seed {family.seed}: entry {entry} of {count}"
            checked += len(replay.sampled)
        assert checked > 1000
