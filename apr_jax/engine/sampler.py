"""Sampling on the device, one row a thread.

Shapes: R rows, V vocabulary entries, B banned ids, E stop ids. All functions are pure and run inside the runner's
compiled programs. Expensive parts run only when some row of the batch asks for them (`lax.cond`), so that one
compiled program serves greedy and sampled batches alike.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What sampling needs of each row.

    Attributes:
      key: u32[R, 2] the thread's random key.
      temperature, top_p, min_p, repetition_penalty: f32[R].
      top_k: i32[R], 0 keeps all.
      banned_ids: i32[R, B], -1 is padding.
      wants_logprobs: bool[R].
    """

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    top_k: jax.Array
    banned_ids: jax.Array
    wants_logprobs: jax.Array


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Divides positive logits of seen tokens by the penalty and multiplies negative ones (CTRL, arXiv 1909.05858).

    Args:
      logits: [R, V].
      seen: bool[R, V] tokens of the thread's own context.
      penalty: [R], 1 is none.
    """
    scale = penalty[:, None].astype(logits.dtype)
    return jnp.where(seen, jnp.where(logits > 0, logits / scale, logits * scale), logits)


def filter_logits(logits: jax.Array, state: SamplingState) -> jax.Array:
    """Sets to -inf what top-k, top-p and min-p leave out, each applied to what the one before kept.

    Args:
      logits: [R, V], already divided by the temperature. Ties at the top-k boundary are all kept.
    """
    vocab_size = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    k = jnp.where(state.top_k > 0, jnp.minimum(state.top_k, vocab_size), vocab_size)
    kth = jnp.take_along_axis(descending, k[:, None] - 1, axis=-1)
    descending = jnp.where(jnp.arange(vocab_size) < k[:, None], descending, -jnp.inf)
    probs = jax.nn.softmax(descending, axis=-1)
    # A token stays while the mass before it is under top_p: the first always does.
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    kept = (mass_before < state.top_p[:, None]) & (probs >= state.min_p[:, None] * probs[:, :1])
    least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.maximum(least, kth), logits, -jnp.inf)


def sample(
    logits: jax.Array, state: SamplingState, num_sampled: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row.

    Args:
      logits: [R, V] of the model.
      num_sampled: i32[R] tokens the thread has sampled so far: folded into its key, so that a draw does not
        depend on who shares the batch.
      seen: bool[R, V], read only where a penalty is set.

    Returns:
      tokens: i32[R]; logprobs: f32[R], the model's own log-probability of them (0 where no row asks).
    """
    raw = logits
    banned = jnp.where(state.banned_ids >= 0, state.banned_ids, logits.shape[-1])
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[rows, banned].set(-jnp.inf, mode="drop")
    logits = lax.cond(
        jnp.any(state.repetition_penalty != 1.0),
        lambda x: penalise(x, seen, state.repetition_penalty),
        lambda x: x,
        logits,
    )
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(x: jax.Array) -> jax.Array:
        x = x / jnp.where(state.temperature > 0, state.temperature, 1.0)[:, None].astype(x.dtype)
        filtered = jnp.any((state.top_k > 0) | (state.top_p < 1.0) | (state.min_p > 0.0))
        x = lax.cond(filtered, lambda y: filter_logits(y, state), lambda y: y, x)

        def noise(key: jax.Array, count: jax.Array) -> jax.Array:
            folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count)
            return jax.random.gumbel(folded, x.shape[-1:], jnp.float32)

        gumbel = jax.vmap(noise)(state.key, num_sampled)
        return jnp.argmax(x + gumbel.astype(x.dtype), axis=-1).astype(jnp.int32)

    stochastic = state.temperature > 0
    drawn = lax.cond(jnp.any(stochastic), draw, lambda _: greedy, logits)
    tokens = jnp.where(stochastic, drawn, greedy)

    def logprob_of(x: jax.Array) -> jax.Array:
        picked = jnp.take_along_axis(jax.nn.log_softmax(x, axis=-1), tokens[:, None], axis=-1)[:, 0]
        return picked.astype(jnp.float32)

    logprobs = lax.cond(jnp.any(state.wants_logprobs), logprob_of, lambda x: jnp.zeros(x.shape[0], jnp.float32), raw)
    return tokens, logprobs
