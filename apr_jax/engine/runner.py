"""Compiles the engine's functions and owns the device state they change: weights and pages.

Letters: R rows, S slots, K steps, V vocabulary, E stop ids. One decode dispatch is one host-to-device batch, one
compiled loop and one device-to-host fetch, however many steps it takes.
"""

import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from apr_kernels.backends import format_for, target_of
from apr_kernels.kv_pages import KVPages, make_kv_pages, read_pages, write_pages
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from apr_jax.config import CacheConfig, EngineConfig, ModelConfig
from apr_jax.engine.attend import Kernels
from apr_jax.engine.batch import DecodeBatch, DecodeResult, PrefillBatch
from apr_jax.engine.kernels import choose_kernels
from apr_jax.engine.steps import Steps, pack_decode
from apr_jax.models.decoder import Decoder
from apr_jax.models.params import build_decoder, named_params
from apr_jax.models.sharding import TENSOR, param_sharding

SWAP_PAGES = 32  # pages moved to or from host memory by one launch


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
        target = target_of(jax.devices()[0])
        steps = Steps(self._graph, engine_config, self.kernels, model_config.vocab_size, target)
        pages, everywhere = self._sharding(PartitionSpec(TENSOR)), self._sharding(PartitionSpec())
        self._prefill = jit_prefill(steps, self._count)
        self._decode = jit_decode(steps, self._count)
        self._read = jax.jit(self._count(_read_all), out_shardings=everywhere)
        self._write = jax.jit(self._count(_write_all), donate_argnums=0, out_shardings=pages)

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
        """The batch as few arrays: (plan, tail_len, ints, floats, seen)."""
        seen = self._nothing_seen(len(batch.key)) if batch.seen is None else batch.seen
        return batch.plan, batch.tail_len, *pack_decode(batch), seen

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

    def _count(self, function: Callable) -> Callable:
        """The function, counted each time it is traced, that is once a compiled program."""

        @functools.wraps(function)
        def counted(*args):
            self.num_compiles += 1
            return function(*args)

        return counted


def jit_prefill(steps: Steps, wrap: Callable = lambda function: function):
    """Compiles `Steps.prefill` with the pages donated and split by heads. `wrap` is applied before."""
    mesh = steps.kernels.mesh
    pages = None if mesh is None else NamedSharding(mesh, PartitionSpec(TENSOR))
    return jax.jit(wrap(steps.prefill), donate_argnums=1, out_shardings=pages)


def jit_decode(steps: Steps, wrap: Callable = lambda function: function):
    """Compiles `Steps.decode` likewise; what it sampled is on every device."""
    mesh = steps.kernels.mesh
    split = None if mesh is None else (NamedSharding(mesh, PartitionSpec(TENSOR)), NamedSharding(mesh, PartitionSpec()))
    return jax.jit(
        wrap(steps.decode), donate_argnums=1, out_shardings=split, compiler_options=steps.decode_options or None
    )


def _write_all(pages: list[KVPages], page_ids, data) -> list[KVPages]:
    return [write_pages(layer, page_ids, part) for layer, part in zip(pages, data, strict=True)]


def _read_all(pages: list[KVPages], page_ids) -> list:
    return [read_pages(layer, page_ids) for layer in pages]


def _padded(page_ids: Sequence[int], fill: int = 0) -> np.ndarray:
    """i32[SWAP_PAGES]: the ids, then `fill`: the null page for reads, a page out of range (dropped) for writes."""
    ids = np.full(SWAP_PAGES, fill, np.int32)
    ids[: len(page_ids)] = page_ids
    return ids
