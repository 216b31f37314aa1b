"""Supervised training: next-token loss on what the model samples, one jitted step.

Letters: B rows, T tokens a row, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from apr_jax.models.decoder import Decoder
from apr_jax.train.attention import masked_attend
from apr_jax.train.packing import visible

Batch = dict[int, dict[str, jax.Array]]  # arrays of packed rows, keyed by row length


def batch_logits(decoder: Decoder, batch: dict[str, jax.Array]) -> jax.Array:
    """Logits [B, T, V] of packed rows (see `packing.Row`)."""

    def one(tokens, positions, end, hide_from, hide_to):
        attend = masked_attend(visible(end, hide_from, hide_to))
        hidden, _ = decoder(tokens, positions, [None] * decoder.config.num_layers, attend)
        return decoder.logits(hidden)

    return jax.vmap(one)(*(batch[f] for f in ("tokens", "positions", "end", "hide_from", "hide_to")))


def token_losses(decoder: Decoder, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Cross entropy [B, T] of each next token, zero where it is forced; and whether it is predicted."""
    logits = batch_logits(decoder, batch)
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    # by a comparison, as an argmax takes ten times as long on a CPU; a tie is no prediction
    predicted = (logits >= jnp.take_along_axis(logits, targets[..., None], axis=-1)).sum(axis=-1) == 1
    return losses * batch["loss"], predicted


def mean_loss(
    decoder: Decoder, batch: Batch, token_weights: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss over the sampled tokens of a step, and metrics: loss (unweighted), accuracy, num_tokens.

    Args:
      token_weights: [V] how much each target token counts; None: all the same. A rare token that much hangs on
        is learned sooner with a larger weight.
    """
    weighted = loss = hits = num_tokens = jnp.zeros(())
    for rows in batch.values():
        losses, correct = token_losses(decoder, rows)
        loss, hits = loss + losses.sum(), hits + (correct * rows["loss"]).sum()
        num_tokens = num_tokens + rows["loss"].sum()
        if token_weights is not None:
            losses = losses * token_weights[jnp.roll(rows["tokens"], -1, axis=1)]
        weighted = weighted + losses.sum()
    scale = 1.0 / jnp.maximum(num_tokens, 1.0)
    return weighted * scale, {"loss": loss * scale, "accuracy": hits * scale, "num_tokens": num_tokens}


def make_train_step(graphdef: Any, optimizer: optax.GradientTransformation, token_weights: jax.Array | None = None):
    """The jitted (params, opt_state, batch) -> (params, opt_state, metrics). Donates params and opt_state."""

    def step(params, opt_state, batch):
        def loss_of(params):
            return mean_loss(nnx.merge(graphdef, params), batch, token_weights)

        with jax.named_scope("gradients"):
            gradients, metrics = jax.grad(loss_of, has_aux=True)(params)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, opt_state, {**metrics, "grad_norm": optax.tree.norm(gradients)}

    return jax.jit(step, donate_argnums=(0, 1))


def make_eval_step(graphdef: Any):
    """The jitted (params, batch) -> (losses: [B, T], hits: bool[B, T])."""
    return jax.jit(lambda params, batch: token_losses(nnx.merge(graphdef, params), batch))
