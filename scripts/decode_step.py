"""A model's whole decode step, random weights, N threads on a shared prefix: the engine's own program, and its parts.

Letters: R rows, K steps a dispatch, T tokens a row, H heads, K KV heads, D head dim, V vocabulary.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from apr_kernels.backends import target_of
from apr_kernels.kv_update import kv_update
from apr_kernels.paged_attention import paged_attention, prepare
from flax import nnx
from jax import lax
from kernel_cases import parse_case
from kernel_layout import build_plan, lay_out
from kernel_runs import Settings, random_pages
from kernel_timing import time_passes

from apr_jax.config import EngineConfig, ModelConfig, check
from apr_jax.engine.attend import Kernels
from apr_jax.engine.batch import PADDING_ID, DecodeBatch
from apr_jax.engine.runner import jit_decode
from apr_jax.engine.sampler import SamplingState, sample
from apr_jax.engine.steps import Steps, pack_decode
from apr_jax.models.params import build_decoder, param_shapes

FORM = r"step_threads(\d+)_prefix(\d+)"
STEPS, FEW_STEPS = 16, 2  # of a dispatch that is timed, and of one that is only run
FIRST_TAIL = 64  # tokens of each thread's own before the dispatch


def measure_step(
    name: str, config: ModelConfig, model: str, settings: Settings, *, timed: bool = True
) -> dict[str, Any]:
    """Times the engine's decode program and, each alone, its attention, update, layers and sampling.

    The bound is that of bytes: every weight that a step reads (of an embedding apart from the output's, R rows) and
    every visible token's keys and values, once a step, at the measured copy bandwidth.

    Args:
      timed: False only runs a dispatch and checks that every row sampled every step.

    Raises:
      ValueError: the name has another form, or the dispatch sampled less than it should.
    """
    found = re.fullmatch(FORM, name)
    check(found is not None, f"case {name!r} must be of the form step_threadsN_prefixN")
    assert found is not None
    step = _Step(int(found[1]), int(found[2]), config, settings, STEPS if timed else FEW_STEPS)
    step.check_dispatch()
    weights = step.weight_bytes()
    tokens = step.prefix + step.num_rows * (FIRST_TAIL + (step.num_steps + 1) / 2)
    kv_bytes = round(tokens * settings.token_bytes * config.num_layers)
    bound = (weights + kv_bytes) / settings.copy_bytes_per_s
    result: dict[str, Any] = {
        "name": name,
        "kind": "step",
        "model": model,
        "parameters": {"threads": step.num_rows, "prefix": step.prefix},
        "weight_bytes": weights,
        "kv_bytes": kv_bytes,
        "unique_bytes": weights + kv_bytes,
        "roofline_us": 1e6 * bound,
        "bound": "bytes",
    }
    if not timed:
        return result
    whole = step.time_dispatch()
    parts = {name: 1e6 * measure() for name, measure in step.parts().items()}
    return result | {
        "us": 1e6 * whole,
        "gb_per_s": 1e-9 * (weights + kv_bytes) / whole,
        "roofline_fraction": bound / whole,
        "tokens_per_s": step.num_rows / whole,
        "parts_us": parts | {"rest": 1e6 * whole - sum(parts.values())},
    }


class _Step:
    """The engine's decode program with all that it is called with."""

    def __init__(self, num_rows: int, prefix: int, config: ModelConfig, settings: Settings, num_steps: int):
        self.num_rows, self.prefix, self.config, self.settings = num_rows, prefix, config, settings
        self.num_steps = num_steps
        case = parse_case(f"decode_readers{num_rows}_prefix{prefix}_tail{FIRST_TAIL + self.num_steps}")
        self.plan = build_plan(
            case,
            settings.page_size,
            item_pages=settings.item_pages,
            target_runs=settings.target_runs[0],
            max_partials=settings.max_partials,
            min_shared_tokens=settings.min_shared_tokens,
        )
        self.kernels = Kernels(settings.backend, None, settings.interpret)
        engine_config = EngineConfig(max_threads=num_rows, steps_per_dispatch=self.num_steps)
        self.decoder = build_decoder(config, settings.dtype, _random_params(config, settings))
        self.graph, self.params = nnx.split(self.decoder)
        target = target_of(jax.devices()[0])
        self.decode = jit_decode(Steps(self.graph, engine_config, self.kernels, config.vocab_size, target))
        num_pages = lay_out(case, settings.page_size).num_pages
        make = jax.jit(functools.partial(random_pages, settings, num_pages))
        self.pages = [make(jax.random.key(i)) for i in range(config.num_layers)]
        self.batch = _batch(self.plan, num_rows, self.num_steps, prefix + FIRST_TAIL, engine_config.max_stop_ids)
        self.inputs = jax.device_put(
            (self.plan, self.batch.tail_len, *pack_decode(self.batch), np.zeros((num_rows, config.vocab_size), bool))
        )

    def weight_bytes(self) -> int:
        """What a step reads of the weights."""
        shapes = param_shapes(self.config, self.settings.dtype)
        sizes = {name: shape.size * shape.dtype.itemsize for name, shape in shapes.items()}
        if not self.config.tie_embeddings:
            shape = shapes["embedding"]
            sizes["embedding"] = self.num_rows * shape.shape[1] * shape.dtype.itemsize
        return sum(sizes.values())

    def check_dispatch(self) -> None:
        self.pages, packed = self.decode(self.params, self.pages, *self.inputs)
        fetched = np.asarray(packed)
        fed, tokens = fetched[:, -1], fetched[:, : self.num_steps]
        full = f"the dispatch fed {fed.min()} tokens to some row, must be {self.num_steps}"
        check(bool((fed == self.num_steps).all()), full)
        check(bool((tokens >= 0).all()), "the dispatch sampled no token at some step")

    def time_dispatch(self) -> float:
        """Seconds a step."""
        return self._time_pages(lambda pages: self.decode(self.params, pages, *self.inputs)[0])

    def parts(self) -> dict[str, Callable[[], float]]:
        """What to call for the seconds of each part."""
        return {
            "attention": self._attention,
            "kv update": self._update,
            "projections and MLP": self._layers,
            "logits and sampling": self._sampling,
        }

    def _time(self, run: Callable, start: Any) -> float:
        """Seconds of each of the steps that a pass makes."""
        return time_passes(run, start, self.num_steps, repeats=self.settings.repeats, min_s=self.settings.min_s).median

    def _time_pages(self, run: Callable) -> float:
        """The same of a pass that donates the pages and returns them: they are kept for the next."""

        def keep(pages):
            self.pages = run(pages)
            return self.pages

        return self._time(keep, self.pages)

    def _lengths(self):
        return self.inputs[1], jnp.ones(self.num_rows, jnp.int32)

    def _options(self) -> dict[str, Any]:
        return {"backend": self.settings.backend, "interpret": self.settings.interpret}

    def _attention(self) -> float:
        tail_len, num_queries = self._lengths()
        plan, page_size = self.inputs[0], self.settings.page_size
        prepared = prepare(plan, tail_len, num_queries, page_size, backend=self.settings.backend)

        @jax.jit
        def run(q, pages, prepared):
            def body(_, q):
                for layer in pages:
                    q, _lse = paged_attention(q, layer, plan, tail_len, num_queries, prepared, **self._options())
                return q

            return lax.fori_loop(0, self.num_steps, body, q)

        shape = (self.num_rows, 1, self.config.num_heads, self.config.head_dim)
        q = jax.random.normal(jax.random.key(0), shape, self.settings.dtype)
        return self._time(lambda q: run(q, self.pages, prepared), q)

    def _update(self) -> float:
        tail_len, num_queries = self._lengths()
        plan = self.inputs[0]
        shape = (self.num_rows, 1, self.config.num_kv_heads, self.config.head_dim)
        k = jax.random.normal(jax.random.key(1), shape, self.settings.dtype)

        @functools.partial(jax.jit, donate_argnums=0)
        def run(pages, k):
            def body(_, pages):
                return [kv_update(layer, k, k, plan, tail_len, num_queries, **self._options()) for layer in pages]

            return lax.fori_loop(0, self.num_steps, body, pages)

        return self._time_pages(lambda pages: run(pages, k))

    def _layers(self) -> float:
        """The decoder with an `attend` that reads no pages: o = q + k + v."""
        graph, group = self.graph, self.config.group_size

        def attend(q, k, v, cache):
            return q + jnp.repeat(k + v, group, axis=1), cache

        @jax.jit
        def run(tokens, params):
            decoder = nnx.merge(graph, params)
            caches = [None] * self.config.num_layers

            def body(_, tokens):
                hidden, _caches = jax.vmap(lambda t: decoder(t[None], t[None], caches, attend))(tokens)
                return jnp.where(jnp.abs(hidden[:, 0]).max(-1) < 0, 0, tokens)  # hangs on all of it, changes nothing

            return lax.fori_loop(0, self.num_steps, body, tokens)

        tokens = jnp.arange(self.num_rows, dtype=jnp.int32) % self.config.vocab_size
        return self._time(lambda tokens: run(tokens, self.params), tokens)

    def _sampling(self) -> float:
        batch, graph = self.batch, self.graph
        names = [field.name for field in dataclasses.fields(SamplingState)]
        state = jax.device_put(SamplingState(**{name: getattr(batch, name) for name in names}))
        seen = self.inputs[-1]

        @jax.jit
        def run(hidden, params, state, seen):
            decoder = nnx.merge(graph, params)

            def body(_, hidden):
                tokens, _logprobs = sample(decoder.logits(hidden), state, jnp.zeros(self.num_rows, jnp.int32), seen)
                return jnp.where((tokens < 0)[:, None], 0, hidden)

            return lax.fori_loop(0, self.num_steps, body, hidden)

        hidden = jax.random.normal(jax.random.key(2), (self.num_rows, self.config.d_model), self.settings.dtype)
        return self._time(lambda hidden: run(hidden, self.params, state, seen), hidden)


def _random_params(config: ModelConfig, settings: Settings) -> Callable[[str], jax.Array]:
    """Draws each parameter on the device: norms one, matrices so that activations keep their size."""
    shapes = param_shapes(config, settings.dtype)
    keys = {name: jax.random.key(i) for i, name in enumerate(shapes)}

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key, shape, dtype):
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        return jax.random.normal(key, shape, dtype) * jnp.asarray(min(shape) ** -0.5, dtype)

    return lambda name: draw(keys[name], shapes[name].shape, shapes[name].dtype)


def _batch(plan, num_rows: int, num_steps: int, position: int, max_stop_ids: int) -> DecodeBatch:
    """Greedy rows that each sample num_steps tokens, with no stop."""

    def ints(value: int) -> np.ndarray:
        return np.full(num_rows, value, np.int32)

    def floats(value: float) -> np.ndarray:
        return np.full(num_rows, value, np.float32)

    no_ids = np.full((num_rows, max_stop_ids), PADDING_ID, np.int32)
    return DecodeBatch(
        threads=(),
        plan=plan,
        tail_len=ints(FIRST_TAIL),
        forced=np.zeros((num_rows, num_steps), np.int32),
        num_forced=ints(1),
        position=ints(position),
        capacity=ints(num_steps),
        budget=ints(num_steps),
        stop_ids=no_ids,
        drain=np.zeros((num_rows, max_stop_ids), bool),
        num_sampled=ints(0),
        key=np.zeros((num_rows, 2), np.uint32),
        temperature=floats(0),
        top_p=floats(1),
        min_p=floats(0),
        repetition_penalty=floats(1),
        top_k=ints(0),
        banned_ids=no_ids,
        wants_logprobs=np.zeros(num_rows, bool),
        seen=None,
    )
