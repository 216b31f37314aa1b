"""Loss and gradients: the training attention equals the plain one, only sampled tokens are learned from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.config import ModelConfig
from apr_jax.models.decoder import Decoder
from apr_jax.models.dense import dense_attend, dense_logits
from apr_jax.tasks.countdown import draw_problems
from apr_jax.tasks.countdown_renderings import RENDERINGS
from apr_jax.tasks.countdown_search import search
from apr_jax.tasks.countdown_vocabulary import vocabulary
from apr_jax.train.attention import CHUNK, masked_attend
from apr_jax.train.countdown_data import PAD_ID, PIECE_IDS
from apr_jax.train.packing import flatten, pack, stack, visible
from apr_jax.train.supervised import batch_logits, mean_loss, token_losses

CONFIG = ModelConfig(
    vocab_size=len(vocabulary()), d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48,
    max_position=2048, tie_embeddings=True,
)  # fmt: skip


def packed_rows(length: int, count: int = 6):
    trees = [search(problem) for problem in draw_problems(51, count)]
    renders = list(RENDERINGS.values())[:2]
    rows = [row for tree in trees for render in renders for row in flatten(render(tree), PIECE_IDS.__getitem__)]
    return pack([row for row in rows if len(row) <= length], [length], PAD_ID)[length]


@pytest.mark.parametrize("num_tokens", [1, 50, CHUNK, 2 * CHUNK + 37])
def test_training_attention_equals_dense_attention(num_tokens):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(num_tokens, h, 8)), jnp.float32) for h in (4, 2, 2))
    mask = jnp.asarray(np.tril(rng.random((num_tokens, num_tokens)) < 0.5) | np.eye(num_tokens, dtype=bool))

    def gradients(attend):
        return jax.value_and_grad(lambda q, k, v: jnp.sin(attend(q, k, v, None)[0]).sum(), (0, 1, 2))(q, k, v)

    leaves = (jax.tree.leaves(gradients(make(mask))) for make in (masked_attend, dense_attend))
    for ours, plain in zip(*leaves, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=2e-5)


def test_large_attention_logits_do_not_overflow():
    q = jnp.full((40, 2, 8), 30.0)
    o, _ = masked_attend(jnp.tril(jnp.ones((40, 40), bool)))(q, q[:, :1], q[:, :1], None)
    np.testing.assert_allclose(o, 30.0, rtol=1e-6)


def test_packed_batch_gives_the_logits_of_plain_forwards():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    rows = packed_rows(384)[:2]
    logits = batch_logits(decoder, stack(rows))
    for row, ours in zip(rows, logits, strict=True):
        mask = visible(*(jnp.asarray(a) for a in (row.end, row.hide_from, row.hide_to)))
        plain = dense_logits(decoder, jnp.asarray(row.tokens), jnp.asarray(row.positions), mask)
        np.testing.assert_allclose(ours, plain, atol=1e-4)


def test_loss_counts_sampled_tokens_only():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(1))
    rows = stack(packed_rows(384)[:1])
    loss, metrics = mean_loss(decoder, {384: rows})
    logits = np.asarray(batch_logits(decoder, rows), np.float64)[0]
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    at = np.flatnonzero(rows["loss"][0])
    expected = -log_probs[at, rows["tokens"][0][at + 1]].mean()
    assert float(metrics["num_tokens"]) == len(at) > 100
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)


def test_gradient_reaches_sampled_predictions_alone():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(2))
    rows = stack(packed_rows(384)[:1])
    logits = batch_logits(decoder, rows)

    def objective(logits):
        targets = jnp.roll(rows["tokens"], -1, axis=1)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -(picked * rows["loss"]).sum()

    reached = jnp.abs(jax.grad(objective)(logits)).sum(axis=-1) > 0
    assert (np.asarray(reached) == (rows["loss"] > 0)).all()
    losses, _ = token_losses(decoder, rows)
    np.testing.assert_allclose(losses.sum(), objective(logits), rtol=1e-5)


def test_what_is_forced_next_does_not_matter_but_a_sampled_token_does():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(3))
    row = packed_rows(384)[0]
    # nothing attends to the last token of a trace: changing it changes one target
    last = int(row.end[0]) - 1
    assert row.loss[last] == 0 and row.loss[last - 1] == 1
    changed = stack([row])
    changed["tokens"][0, last] = 7
    before, after = (token_losses(decoder, rows)[0][0] for rows in (stack([row]), changed))
    assert [int(i) for i in jnp.flatnonzero(before != after)] == [last - 1]
    # the trace that follows in the row is not seen either: its first tokens, a prompt, are no targets
    assert (row.loss[last + 1 : last + 6] == 0).all()
