"""The engine's programs: prefill, and the loop of decode steps, as functions of parameters, pages and a batch.

Letters: R rows, S slots, K steps, V vocabulary. `runner.py` compiles them for the devices at hand; anything else that
wants to know what a compiler makes of them compiles the same functions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from apr_kernels.backends import REFERENCE, Target
from apr_kernels.kv_pages import KVPages
from apr_kernels.plan import Plan
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from apr_jax.config import EngineConfig
from apr_jax.engine.attend import Kernels, make_attend
from apr_jax.engine.batch import PADDING_ID, DecodeBatch
from apr_jax.engine.sampler import SamplingState, sample
from apr_jax.models.sharding import TENSOR

_INTS = ("num_forced", "position", "capacity", "budget", "num_sampled", "top_k", "wants_logprobs")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loop:
    """What moves in the decode loop.

    Attributes:
      step: i32[] steps taken. tail_len: i32[S]. token, position: i32[R] to be fed next.
      num_fed, budget, num_sampled: i32[R]. active, draining: bool[R]. seen: bool[R, V].
      tokens: i32[R, K]; logprobs: f32[R, K].
    """

    step: jax.Array
    pages: list[KVPages]
    tail_len: jax.Array
    token: jax.Array
    position: jax.Array
    num_fed: jax.Array
    budget: jax.Array
    num_sampled: jax.Array
    active: jax.Array
    draining: jax.Array
    seen: jax.Array
    tokens: jax.Array
    logprobs: jax.Array


def pack_decode(batch: DecodeBatch) -> tuple[np.ndarray, np.ndarray]:
    """A batch's settings as two arrays, so that a dispatch moves few: ints [R, ...] and floats [R, 4]."""
    ints = [getattr(batch, name).astype(np.int32) for name in _INTS]
    blocks = [batch.key.view(np.int32), batch.forced, batch.stop_ids, batch.drain, batch.banned_ids]
    packed = np.concatenate([np.stack(ints, axis=1), *blocks], axis=1).astype(np.int32)
    return packed, np.stack([getattr(batch, name) for name in _FLOATS], axis=1)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The programs of one model and configuration.

    Attributes:
      graph: the decoder's structure, `nnx.split(decoder)[0]`.
      target: what they are compiled for.
    """

    graph: Any
    config: EngineConfig
    kernels: Kernels
    vocab_size: int
    target: Target

    @property
    def decode_options(self) -> dict[str, bool]:
        """Options of the compiler for `decode`.

        A tpu7x lays bfloat16 values out in tiles of 16 rows within a loop and in tiles of 8 outside: without the option
        all weights are laid out anew, into memory of their own, at every dispatch. Their products read either.
        """
        on_tpu7x = self.target.kind.startswith("TPU7")
        return {"xla_tpu_control_large_2nd_minor_layout_for_x16": False} if on_tpu7x else {}

    def _forward(self, params, pages, plan, tail_len, tokens, positions, num_queries):
        decoder = nnx.merge(self.graph, params)
        attend = make_attend(self.kernels, plan, tail_len, num_queries, tokens.shape[1], pages[0])

        def one_thread(tokens, positions):
            return decoder(tokens, positions, pages, attend)

        hidden, pages = jax.vmap(one_thread, out_axes=(0, None))(tokens, positions)
        return decoder, hidden, pages

    def prefill(self, params, pages, plan: Plan, tail_len, tokens, positions, num_queries):
        """Writes the keys of tokens: [R, T]; returns the pages."""
        with jax.named_scope("prefill"):
            return self._forward(params, pages, plan, tail_len, tokens, positions, num_queries)[2]

    def decode(self, params, pages, plan: Plan, tail_len, ints, floats, seen):
        """Up to K steps of one token a row.

        Args:
          ints, floats: of `pack_decode`.
          seen: bool[R, V] tokens that a repetition penalty counts.

        Returns:
          The pages, and i32[R, 2 K + 1]: tokens, the bits of their logprobs, tokens fed.
        """
        num_steps, num_stops = self.config.steps_per_dispatch, self.config.max_stop_ids
        row = dict(zip(_INTS, ints.T[: len(_INTS)], strict=True))
        at = len(_INTS)
        key = lax.bitcast_convert_type(ints[:, at : at + 2], jnp.uint32)
        at += 2
        forced = ints[:, at : at + num_steps]
        at += num_steps
        stop_ids, drain, banned_ids = (ints[:, at + i * num_stops : at + (i + 1) * num_stops] for i in range(3))
        num_rows, num_slots = ints.shape[0], tail_len.shape[0]
        sampling = SamplingState(
            key=key,
            top_k=row["top_k"],
            banned_ids=banned_ids,
            wants_logprobs=row["wants_logprobs"] != 0,
            **dict(zip(_FLOATS, floats.T, strict=True)),
        )
        rows = jnp.arange(num_rows)
        head = nnx.merge(self.graph, params).transposed_head() if self.kernels.backend == REFERENCE else None

        def body(loop: _Loop) -> _Loop:
            num_queries = loop.active.astype(jnp.int32)
            decoder, hidden, pages = self._forward(
                params,
                loop.pages,
                plan,
                loop.tail_len,
                loop.token[:, None],
                loop.position[:, None],
                num_queries,
            )
            logits = decoder.logits(hidden[:, 0], head)
            if self.kernels.mesh is not None:  # every device samples the same
                mesh = self.kernels.mesh
                if self.vocab_size % mesh.shape[TENSOR] == 0:  # or XLA gathers the head's weights, not the logits
                    split = NamedSharding(mesh, PartitionSpec(None, TENSOR))
                    logits = lax.with_sharding_constraint(logits, split)
                logits = lax.with_sharding_constraint(logits, NamedSharding(mesh, PartitionSpec()))
            with jax.named_scope("sample"):
                sampled, logprobs = sample(logits, sampling, loop.num_sampled, loop.seen)
            num_fed = loop.num_fed + num_queries
            is_forced = num_fed < row["num_forced"]
            forced_next = forced[rows, jnp.minimum(num_fed, num_steps - 1)]
            takes = loop.active & ~is_forced & ~loop.draining & (loop.budget > 0)
            hits = (stop_ids == sampled[:, None]) & takes[:, None]
            stops = jnp.any(hits, axis=1)
            draining = jnp.any(hits & (drain != 0), axis=1)
            budget = loop.budget - takes.astype(jnp.int32)
            goes_on = is_forced | (takes & ~stops & (budget > 0)) | draining
            counted = jnp.where(takes, sampled, self.vocab_size)
            return _Loop(
                step=loop.step + 1,
                pages=pages,
                tail_len=loop.tail_len.at[plan.row_slot].add(num_queries, mode="drop"),
                token=jnp.where(is_forced, forced_next, sampled),
                position=loop.position + num_queries,
                num_fed=num_fed,
                budget=budget,
                num_sampled=loop.num_sampled + takes.astype(jnp.int32),
                active=loop.active & goes_on & (num_fed < row["capacity"]),
                draining=draining,
                seen=loop.seen.at[rows, counted].set(True, mode="drop"),
                tokens=loop.tokens.at[:, loop.step].set(jnp.where(takes, sampled, PADDING_ID)),
                logprobs=loop.logprobs.at[:, loop.step].set(jnp.where(takes, logprobs, 0.0)),
            )

        loop = _Loop(
            step=jnp.int32(0),
            pages=pages,
            tail_len=tail_len,
            token=forced[:, 0],
            position=row["position"],
            num_fed=jnp.zeros(num_rows, jnp.int32),
            budget=row["budget"],
            num_sampled=row["num_sampled"],
            active=row["capacity"] > 0,
            draining=jnp.zeros(num_rows, bool),
            seen=seen,
            tokens=jnp.full((num_rows, num_steps), PADDING_ID, jnp.int32),
            logprobs=jnp.zeros((num_rows, num_steps), jnp.float32),
        )
        assert num_slots == plan.tail_pages.shape[0]
        with jax.named_scope("decode"):
            if self.target.platform != "cuda":
                loop = lax.while_loop(lambda x: (x.step < num_steps) & jnp.any(x.active), body, loop)
            else:  # there the while loop asks the host at every iteration unless its trip count is known
                loop, _ = lax.scan(lambda x, _: (body(x), None), loop, length=num_steps)
        logprob_bits = lax.bitcast_convert_type(loop.logprobs, jnp.int32)
        return loop.pages, jnp.concatenate([loop.tokens, logprob_bits, loop.num_fed[:, None]], axis=1)
