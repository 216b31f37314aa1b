"""Every compiled function of the engine, and the device state they own: weights and pages.

Letters: R rows, S slots, K steps, V vocabulary, E stop ids. One decode dispatch is one host-to-device batch, one
compiled loop and one device-to-host fetch, however many steps it takes.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from apr_kernels.backends import format_for
from apr_kernels.kv_pages import KVPages, make_kv_pages, read_pages, write_pages
from apr_kernels.plan import Plan
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from apr_jax.config import CacheConfig, EngineConfig, ModelConfig
from apr_jax.engine.attend import Kernels, make_attend
from apr_jax.engine.batch import PADDING_ID, DecodeBatch, DecodeResult, PrefillBatch
from apr_jax.engine.kernels import choose_kernels
from apr_jax.engine.sampler import SamplingState, sample
from apr_jax.models.decoder import Decoder
from apr_jax.models.params import build_decoder, named_params
from apr_jax.models.sharding import TENSOR, param_sharding

SWAP_PAGES = 32  # pages moved to or from host memory by one launch

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


class Runner:
    """Runs batches on the device. Compiled programs are made at first use; `num_compiles` counts them.

    Args:
      decoder: its parameters are moved into the runner; change them with `update_params`.
      kernels: None: chosen by platform and `engine_config`.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        decoder: Decoder,
        cache_config: CacheConfig,
        engine_config: EngineConfig,
        kernels: Kernels | None = None,
    ):
        self.config = engine_config
        self.vocab_size = model_config.vocab_size
        self.num_compiles = 0
        self._unseen: dict[int, jax.Array] = {}
        if engine_config.compile_cache_dir is not None:
            os.makedirs(engine_config.compile_cache_dir, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", engine_config.compile_cache_dir)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        self.kernels = kernels or choose_kernels(model_config, cache_config, engine_config)
        self._model_config, self._mesh = model_config, self.kernels.mesh
        self.update_params(decoder)
        self.pages = self._make_pages(cache_config, jnp.dtype(engine_config.kv_dtype or engine_config.dtype))
        # XLA's GPU while loop asks the host at every iteration unless the trip count is known.
        self.early_exit = jax.default_backend() != "gpu"
        pages, everywhere = self._sharding(PartitionSpec(TENSOR)), self._sharding(PartitionSpec())
        self._prefill = jax.jit(self._prefill_fn, donate_argnums=1, out_shardings=pages)
        self._decode = jax.jit(self._decode_fn, donate_argnums=1, out_shardings=(pages, everywhere))
        self._read = jax.jit(self._read_fn, out_shardings=everywhere)
        self._write = jax.jit(self._write_fn, donate_argnums=0, out_shardings=pages)

    def update_params(self, decoder: Decoder) -> None:
        """Takes new weights of the same architecture. The caller flushes the prefix cache."""
        if self._mesh is not None:
            mesh, params = self._mesh, named_params(decoder)
            placed = {name: jax.device_put(x, param_sharding(mesh, name, x.shape)) for name, x in params.items()}
            decoder = build_decoder(decoder.config, decoder.dtype, placed.__getitem__)
        self._graph, self.params = nnx.split(decoder)

    def _sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        return None if self._mesh is None else NamedSharding(self._mesh, spec)

    def _make_pages(self, cache_config: CacheConfig, dtype) -> list[KVPages]:
        """One store a layer, made where it stays."""
        config = self._model_config
        make = functools.partial(
            make_kv_pages,
            cache_config.num_pages,
            cache_config.page_size,
            config.num_kv_heads,
            config.head_dim,
            dtype,
            format_for(self.kernels.backend, config.head_dim),
        )
        make = jax.jit(make, out_shardings=self._sharding(PartitionSpec(TENSOR)))
        return [make() for _ in range(config.num_layers)]

    # What the host calls.

    def prefill(self, batch: PrefillBatch) -> None:
        """Feeds the batch's tokens. Donates the pages; does not wait for the device."""
        self.pages = self._prefill(
            self.params,
            self.pages,
            batch.plan,
            batch.tail_len,
            batch.tokens,
            batch.positions,
            batch.num_queries,
        )

    def decode(self, batch: DecodeBatch) -> DecodeResult:
        """Runs up to K steps and waits for what they sampled. Donates the pages."""
        self.pages, packed = self._decode(self.params, self.pages, *self._decode_inputs(batch))
        num_steps = self.config.steps_per_dispatch
        fetched = np.asarray(packed)
        return DecodeResult(
            tokens=fetched[:, :num_steps],
            logprobs=fetched[:, num_steps : 2 * num_steps].copy().view(np.float32),
            num_fed=fetched[:, 2 * num_steps],
        )

    def decode_memory(self, batch: DecodeBatch):
        """XLA's memory analysis of the decode program for this batch's shapes; compiles it anew."""
        return self._decode.lower(self.params, self.pages, *self._decode_inputs(batch)).compile().memory_analysis()

    def _decode_inputs(self, batch: DecodeBatch) -> tuple:
        """The batch as few arrays: (plan, tail_len, ints [R, ...], floats [R, 4], seen)."""
        ints = [getattr(batch, name).astype(np.int32) for name in _INTS]
        blocks = [batch.key.view(np.int32), batch.forced, batch.stop_ids, batch.drain, batch.banned_ids]
        packed = np.concatenate([np.stack(ints, axis=1), *blocks], axis=1).astype(np.int32)
        floats = np.stack([getattr(batch, name) for name in _FLOATS], axis=1)
        seen = self._nothing_seen(len(packed)) if batch.seen is None else batch.seen
        return batch.plan, batch.tail_len, packed, floats, seen

    def _nothing_seen(self, num_rows: int) -> jax.Array:
        """bool[R, V] of False that stays on the device: most batches have no penalty to count for."""
        if num_rows not in self._unseen:
            self._unseen[num_rows] = jax.device_put(np.zeros((num_rows, self.vocab_size), bool))
        return self._unseen[num_rows]

    def read_pages(self, page_ids: Sequence[int]) -> list[list[np.ndarray]]:
        """Copies pages to host memory: one list of arrays [n, ...] a layer."""
        parts = []
        for start in range(0, len(page_ids), SWAP_PAGES):
            ids = _padded(page_ids[start : start + SWAP_PAGES])
            count = min(SWAP_PAGES, len(page_ids) - start)
            fetched = jax.device_get(self._read(self.pages, ids))
            parts.append([[leaf[:count] for leaf in jax.tree.leaves(layer)] for layer in fetched])
        return [[np.concatenate(leaves) for leaves in zip(*layers, strict=True)] for layers in zip(*parts, strict=True)]

    def write_pages(self, page_ids: Sequence[int], data: list[list[np.ndarray]]) -> None:
        """Copies what `read_pages` returned back, to other pages if need be. Donates the pages."""
        structure = jax.tree.structure(jax.eval_shape(_read_all, self.pages, _padded([])))
        for start in range(0, len(page_ids), SWAP_PAGES):
            ids = _padded(page_ids[start : start + SWAP_PAGES], self.pages[0].num_pages)
            leaves = []
            for leaf in (leaf for layer in data for leaf in layer):
                part = leaf[start : start + SWAP_PAGES]
                padding = [(0, SWAP_PAGES - len(part))] + [(0, 0)] * (part.ndim - 1)
                leaves.append(np.pad(part, padding))
            self.pages = self._write(self.pages, ids, jax.tree.unflatten(structure, leaves))

    # What is compiled.

    def _forward(self, params, pages, plan, tail_len, tokens, positions, num_queries):
        decoder = nnx.merge(self._graph, params)
        attend = make_attend(self.kernels, plan, tail_len, num_queries, tokens.shape[1], pages[0])

        def one_thread(tokens, positions):
            return decoder(tokens, positions, pages, attend)

        hidden, pages = jax.vmap(one_thread, out_axes=(0, None))(tokens, positions)
        return decoder, hidden, pages

    def _prefill_fn(self, params, pages, plan: Plan, tail_len, tokens, positions, num_queries):
        self.num_compiles += 1  # runs when tracing, that is once a compiled program
        with jax.named_scope("prefill"):
            return self._forward(params, pages, plan, tail_len, tokens, positions, num_queries)[2]

    def _decode_fn(self, params, pages, plan: Plan, tail_len, ints, floats, seen):
        self.num_compiles += 1
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
            logits = decoder.logits(hidden[:, 0])
            if self._mesh is not None:  # every device samples the same
                logits = lax.with_sharding_constraint(logits, self._sharding(PartitionSpec()))
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
            if self.early_exit:
                loop = lax.while_loop(lambda x: (x.step < num_steps) & jnp.any(x.active), body, loop)
            else:
                loop, _ = lax.scan(lambda x, _: (body(x), None), loop, length=num_steps)
        logprob_bits = lax.bitcast_convert_type(loop.logprobs, jnp.int32)
        return loop.pages, jnp.concatenate([loop.tokens, logprob_bits, loop.num_fed[:, None]], axis=1)

    def _read_fn(self, pages, page_ids):
        self.num_compiles += 1
        return _read_all(pages, page_ids)

    def _write_fn(self, pages, page_ids, data):
        self.num_compiles += 1
        return [write_pages(layer, page_ids, part) for layer, part in zip(pages, data, strict=True)]


def _read_all(pages: list[KVPages], page_ids) -> list:
    return [read_pages(layer, page_ids) for layer in pages]


def _padded(page_ids: Sequence[int], fill: int = 0) -> np.ndarray:
    """i32[SWAP_PAGES]: the ids, then `fill`: the null page for reads, a page out of range (dropped) for writes."""
    ids = np.full(SWAP_PAGES, fill, np.int32)
    ids[: len(page_ids)] = page_ids
    return ids
