"""Forked and joined logits equal a dense forward pass with explicit mask and positions.

The cache, the plan and the kernels are driven directly, one thread a call or all children as rows of one, so
that a failure is theirs and not the engine's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apr_kernels.kv_pages import make_kv_pages
from apr_kernels.kv_update import kv_update
from apr_kernels.paged_attention import paged_attention
from apr_kernels.plan import validate_plan
from flax import nnx
from jax.custom_batching import custom_vmap

from apr_jax.cache import Context, KVCache, PlanBuilder, marked_segments, own_segments
from apr_jax.config import CacheConfig, EngineConfig, ModelConfig
from apr_jax.models.decoder import Decoder
from apr_jax.models.dense import dense_logits

CONFIG = ModelConfig(
    vocab_size=61,
    d_model=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=32,
    max_position=512,
)
NUM_SLOTS = 6
CHUNK = 24  # tokens a row and call
NUM_ROWS = 3
DENSE_TOKENS = 160  # of a dense pass, padding included: one compile for all tests


@dataclasses.dataclass
class Seen:
    """A context beside what it must see: indices into the dense pass."""

    context: Context
    visible: list[int]


class Harness:
    """Feeds tokens through the paged cache, and keeps what a dense pass needs."""

    def __init__(self, decoder: Decoder, page_size: int):
        self.decoder = decoder
        config = CacheConfig(page_size=page_size, num_pages=2048 // page_size + 2, prefix_cache=True)
        engine_config = EngineConfig(
            max_tail_pages=max(1, 64 // page_size), item_pages=3, min_shared_tokens=4, max_partials=12
        )
        self.cache = KVCache(config, engine_config.max_tail_pages)
        self.plans = PlanBuilder(config, engine_config)
        self.pages = [
            make_kv_pages(config.num_pages, page_size, CONFIG.num_kv_heads, CONFIG.head_dim, jnp.float32)
            for _ in range(CONFIG.num_layers)
        ]
        unused = jnp.full_like(self.pages[0].k, np.nan)
        self.pages = [dataclasses.replace(pages, k=unused, v=unused) for pages in self.pages]
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.masks: list[list[int]] = []
        self.logits: list[np.ndarray] = []
        self.rng = np.random.default_rng(0)

    def new(self) -> Seen:
        return Seen(self.cache.new_context(), [])

    def fork(self, parent: Seen, n: int) -> list[Seen]:
        return [Seen(context, list(parent.visible)) for context in self.cache.fork(parent.context, n)]

    def feed(self, *lengths: tuple[Seen, int]) -> None:
        """Feeds random tokens, all given threads side by side, in one call."""
        tokens = np.zeros((NUM_ROWS, CHUNK), np.int32)
        positions = np.zeros((NUM_ROWS, CHUNK), np.int32)
        num_queries = np.zeros(NUM_ROWS, np.int32)
        slots = {(2 * i + 1) % NUM_SLOTS: each for i, each in enumerate(lengths)}
        for seen, length in lengths:
            self.cache.reserve(seen.context, length)
        plan = self.plans.build([(slot, seen.context) for slot, (seen, _) in slots.items()], NUM_ROWS, NUM_SLOTS)
        validate_plan(plan, num_pages=self.cache.config.num_pages, page_size=self.cache.page_size)
        tail_len = np.zeros(NUM_SLOTS, np.int32)
        for row, slot in enumerate(plan.row_slot):
            if slot < NUM_SLOTS:
                seen, length = slots[int(slot)]
                tokens[row, :length] = self.rng.integers(CONFIG.vocab_size, size=length)
                positions[row] = seen.context.next_position + np.arange(CHUNK)
                num_queries[row] = length
                tail_len[slot] = seen.context.tail_len
        logits, self.pages = _step(self.decoder, tokens, positions, self.pages, plan, tail_len, num_queries)
        for row, slot in enumerate(plan.row_slot):
            if slot < NUM_SLOTS:
                seen, length = slots[int(slot)]
                self._note(seen, tokens[row, :length], positions[row, :length], np.asarray(logits[row, :length]))

    def _note(self, seen: Seen, tokens, positions, logits) -> None:
        for token, position, row in zip(tokens, positions, logits):
            seen.visible.append(len(self.tokens))
            self.masks.append(list(seen.visible))
            self.tokens.append(int(token))
            self.positions.append(int(position))
            self.logits.append(row)
        self.cache.advance(seen.context, [int(token) for token in tokens])
        self.cache.check()

    def join(self, parent: Seen, children: list[Seen], mode: str = "stitch") -> None:
        num_parent = len(parent.visible)
        parts = []
        for child in children:
            self.cache.seal(child.context)
            marked = mode == "conclusion"
            parts.append((marked_segments if marked else own_segments)(child.context))
            own = child.visible[num_parent:]
            parent.visible += own[len(own) - sum(len(s.token_ids) for s in parts[-1]) :]
        position = max(child.context.next_position for child in children)
        self.cache.join(parent.context, parts, position)
        for child in children:
            self.cache.release(child.context)
        self.cache.check()

    def compare(self) -> None:
        n = len(self.tokens)
        mask = np.zeros((DENSE_TOKENS, DENSE_TOKENS), bool)
        for token, visible in enumerate(self.masks):
            mask[token, visible] = True
        padded = (np.pad(np.array(each, np.int32), (0, DENSE_TOKENS - n)) for each in (self.tokens, self.positions))
        want = np.asarray(_dense(self.decoder, *padded, mask))[:n]
        np.testing.assert_allclose(np.stack(self.logits), want, atol=1e-4, rtol=1e-4)


_dense = jax.jit(dense_logits)


@jax.jit
def _step(decoder, tokens, positions, pages, plan, tail_len, num_queries):
    """Rows through the decoder under vmap; `attend_rows` collects q, k and v of all of them."""

    @custom_vmap
    def attend_rows(q, k, v, layer, plan, tail_len, num_queries):
        return q, layer

    @attend_rows.def_vmap
    def _(size, batched, q, k, v, layer, plan, tail_len, num_queries):
        layer = kv_update(layer, k, v, plan, tail_len, num_queries)
        o, _ = paged_attention(q, layer, plan, tail_len, num_queries)
        return (o, layer), (True, jax.tree.map(lambda _: False, layer))

    def attend(q, k, v, layer):
        return attend_rows(q, k, v, layer, plan, tail_len, num_queries)

    def row(tokens, positions):
        hidden, new = decoder(tokens, positions, pages, attend)
        return decoder.logits(hidden), new

    return jax.vmap(row, out_axes=(0, None))(tokens, positions)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("page_size", [1, 8, 16, 64])
def test_forks_and_joins_equal_the_dense_pass(decoder, page_size):
    harness = Harness(decoder, page_size)
    root = harness.new()
    harness.feed((root, 21))
    left, right, idle = harness.fork(root, 3)
    harness.feed((left, 5), (right, 9))
    harness.feed((left, 1), (right, 1), (idle, 1))
    inner = harness.fork(right, 2)  # a nested fork
    harness.feed((inner[0], 7), (inner[1], 2), (left, 16))
    harness.join(right, inner)
    harness.feed((right, 3), (left, 1))
    harness.join(root, [left, right, idle])  # a join of a join
    harness.feed((root, 12))
    again = harness.fork(root, 2)
    harness.feed((again[0], 4), (again[1], 24))
    harness.join(root, again)
    harness.feed((root, 2))
    harness.compare()


@pytest.mark.parametrize("page_size", [1, 16])
def test_conclusion_and_select_equal_the_dense_pass(decoder, page_size):
    harness = Harness(decoder, page_size)
    root = harness.new()
    harness.feed((root, 17))
    children = harness.fork(root, 2)
    harness.feed((children[0], 6), (children[1], 3))
    for child in children:
        harness.cache.mark(child.context)
    harness.feed((children[0], 4), (children[1], 20))
    harness.join(root, children, "conclusion")
    harness.feed((root, 5))
    branches = harness.fork(root, 3)
    harness.feed(*((branch, 4 + i) for i, branch in enumerate(branches)))
    harness.join(root, [branches[1]])  # select
    for branch in (branches[0], branches[2]):
        harness.cache.release(branch.context)
    harness.feed((root, 8))
    harness.compare()


def test_a_prefix_hit_equals_the_dense_pass(decoder):
    harness = Harness(decoder, 8)
    root = harness.new()
    harness.feed((root, 24))
    harness.cache.commit_prefix(root.context)
    context, matched = harness.cache.match_prefix([*harness.tokens[:20], 5, 6])
    assert matched == 16
    other = Seen(context, root.visible[:16])
    harness.feed((other, 7), (root, 5))
    harness.compare()
