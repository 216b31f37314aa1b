"""What a step is compiled for: a model, threads and their contexts, and the abstract arguments these give.

Letters: R rows, S slots, T tokens of a prefill chunk. Nothing is allocated but the host's plan.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from apr_kernels.backends import REFERENCE, choose_backend, format_for
from apr_kernels.kv_pages import KVPages, make_kv_pages
from apr_kernels.plan import Plan
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from apr_jax.aot.target import AotTarget
from apr_jax.cache.cache import KVCache
from apr_jax.cache.context import Context
from apr_jax.cache.plan_builder import PlanBuilder
from apr_jax.config import CacheConfig, EngineConfig, ModelConfig, check
from apr_jax.engine.attend import Kernels
from apr_jax.engine.batch import decode_batch, prefill_batch
from apr_jax.engine.runner import jit_decode, jit_prefill
from apr_jax.engine.steps import Steps, pack_decode
from apr_jax.models.params import build_decoder, param_shapes
from apr_jax.models.sharding import TENSOR, check_divisible, make_mesh, param_sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contexts:
    """What the threads attend to.

    Attributes:
      threads: how many there are, all of one family.
      context: tokens each sees.
      own: tokens of `context` in each thread's own tail; the others are a prefix that all share.
    """

    threads: int
    context: int
    own: int

    def __post_init__(self):
        for name in ("threads", "context"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, must be >= 1")
        check(0 <= self.own <= self.context, f"own is {self.own}, must be in [0, context = {self.context}]")

    @property
    def shared(self) -> int:
        """Tokens of the prefix that all threads share."""
        return self.context - self.own

    @property
    def unique_tokens(self) -> int:
        """Tokens whose keys a decode step must read once."""
        return self.shared + self.threads * self.own

    def pages(self, page_size: int, max_tail_pages: int) -> int:
        """Pages of a pool that holds them with every tail at its largest, the null page among them."""
        return 1 + -(-self.shared // page_size) + self.threads * max_tail_pages


@dataclasses.dataclass(frozen=True)
class Step:
    """One of the engine's programs with the shapes of its arguments.

    Attributes:
      name: "prefill" or "decode".
      function: what `jax.jit` returned.
      args: shapes with shardings; parameters first, then one page store a layer.
      unread: names of parameters that it does not read, or reads a few rows of.
      read_tokens: tokens whose keys it reads, each counted once.
    """

    name: str
    function: Any
    args: tuple
    unread: frozenset[str]
    read_tokens: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """Both steps of an engine, and the sizes of what they share.

    Attributes:
      params: name -> shape a device holds. pages: what a device holds of one layer's store.
    """

    backend: str
    num_pages: int
    params: dict[str, jax.ShapeDtypeStruct]
    pages: KVPages
    num_layers: int
    steps: tuple[Step, ...]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all page stores on one device."""
        return self.num_layers * self.pages.bytes

    @property
    def token_bytes(self) -> float:
        """Bytes of one token's keys and values in all layers on one device, as they are stored."""
        return self.cache_bytes / (self.num_pages * self.pages.page_size)

    def read_bytes(self, step: Step) -> int:
        """Bytes a device must read for a step: weights, and the keys and values of its contexts, each once."""
        weights = sum(x.size * x.dtype.itemsize for name, x in self.params.items() if name not in step.unread)
        return weights + round(step.read_tokens * self.token_bytes)


POOL_SHARE = 0.8  # of a device's memory for weights and pages together; the rest is for temporaries


def pool_pages(target: AotTarget, model: ModelConfig, engine: EngineConfig, page_size: int) -> int:
    """Pages that a pool has room for beside the weights, in POOL_SHARE of the memory; 0 where there is none.

    As if everything were split evenly over `engine.tensor` devices.
    """
    weights = sum(x.size * x.dtype.itemsize for x in param_shapes(model, jnp.dtype(engine.dtype)).values())
    kv_dtype = jnp.dtype(engine.kv_dtype or engine.dtype)
    format = format_for(_backend(target, engine.attention, kv_dtype, page_size, model.head_dim), model.head_dim)
    two = jax.eval_shape(
        functools.partial(make_kv_pages, 2, page_size, model.num_kv_heads, model.head_dim, kv_dtype, format)
    )
    free = POOL_SHARE * target.device_memory * engine.tensor - weights
    return max(0, int(free // (two.bytes / 2 * model.num_layers)))


def make_workload(
    target: AotTarget,
    devices: Sequence[Any],
    model: ModelConfig,
    engine: EngineConfig,
    contexts: Contexts,
    page_size: int,
    num_pages: int,
) -> Workload:
    """The steps as the engine would compile them on these devices.

    Args:
      engine: `max_threads` must be `contexts.threads`.
      num_pages: of the pool.

    Raises:
      ValueError: the model cannot be split, the contexts do not fit the pool or a plan, or no kernel serves the pages.
    """
    if engine.tensor > 1:
        check_divisible(model, engine.tensor)
    check(
        contexts.context + 1 <= model.max_position,
        f"context is {contexts.context}, the model's window is {model.max_position} tokens",
    )
    check(
        contexts.own < engine.max_tail_pages * page_size,
        f"own is {contexts.own}, a tail has room for {engine.max_tail_pages * page_size - 1} and the next token",
    )
    needed = contexts.pages(page_size, engine.max_tail_pages)
    check(num_pages >= needed, f"num_pages is {num_pages}, the contexts need {needed}")
    cache = CacheConfig(page_size=page_size, num_pages=num_pages, prefix_cache=False)
    kv_dtype = jnp.dtype(engine.kv_dtype or engine.dtype)
    backend = _backend(target, engine.attention, kv_dtype, page_size, model.head_dim)
    kernels = Kernels(backend, make_mesh(engine.tensor, devices), cores=target.kernels.cores)
    place = _Place(kernels.mesh, devices[0])
    shapes = param_shapes(model, jnp.dtype(engine.dtype))
    placed = {name: place.param(name, shape) for name, shape in shapes.items()}
    read: Callable[[str], Any] = placed.__getitem__  # shapes in the place of arrays
    graph, params = nnx.split(build_decoder(model, jnp.dtype(engine.dtype), read))
    make = functools.partial(
        make_kv_pages, num_pages, page_size, model.num_kv_heads, model.head_dim, kv_dtype,
        format_for(kernels.backend, model.head_dim),
    )  # fmt: skip
    store = jax.eval_shape(make)
    pages = [place.pages(store) for _ in range(model.num_layers)]
    steps = Steps(graph, engine, kernels, model.vocab_size, target.kernels)
    return Workload(
        backend=kernels.backend,
        num_pages=num_pages,
        params={name: _on_device(x) for name, x in placed.items()},
        pages=jax.tree.map(_on_device, pages[0]),
        num_layers=model.num_layers,
        steps=(
            _prefill_step(steps, cache, contexts, place, (params, pages)),
            _decode_step(steps, cache, contexts, place, (params, pages), model),
        ),
    )


def _prefill_step(steps: Steps, cache: CacheConfig, contexts: Contexts, place: "_Place", state: tuple) -> Step:
    """The full chunk of the full number of rows, behind the shared prefix and as much of a tail as has room."""
    engine = steps.config
    rows, chunk = engine.prefill_rows, engine.prefill_chunk
    threads = min(rows, contexts.threads)
    room = engine.max_tail_pages * cache.page_size - chunk
    check(room >= 0, f"a prefill chunk of {chunk} tokens, a tail has room for {room + chunk}")
    own = min(contexts.own, room)
    held = _contexts(cache, engine, threads, contexts.shared, own, reserve=chunk)
    plan = PlanBuilder(cache, engine, engine.max_prefill_partials).build(
        list(enumerate(held)), rows, engine.max_threads, num_queries=chunk
    )
    batch = prefill_batch({}, {}, plan, engine.max_threads, chunk)
    inputs = (plan, batch.tail_len, batch.tokens, batch.positions, batch.num_queries)
    return Step(
        name="prefill",
        function=jit_prefill(steps),
        args=(*state, *place.everywhere(inputs)),
        unread=frozenset({"embedding", "lm_head", "final_norm.scale"}),
        read_tokens=contexts.shared + threads * own,
    )


def _decode_step(
    steps: Steps, cache: CacheConfig, contexts: Contexts, place: "_Place", state: tuple, model: ModelConfig
) -> Step:
    engine = steps.config
    held = _contexts(cache, engine, contexts.threads, contexts.shared, contexts.own, reserve=1)
    plan: Plan = PlanBuilder(cache, engine).build(list(enumerate(held)), contexts.threads, engine.max_threads)
    batch = decode_batch(
        {}, {}, plan,
        num_slots=engine.max_threads, num_steps=engine.steps_per_dispatch, max_stop_ids=engine.max_stop_ids,
        eos_ids=model.eos_ids, vocab_size=model.vocab_size,
    )  # fmt: skip
    seen = jax.ShapeDtypeStruct((contexts.threads, model.vocab_size), jnp.bool_)
    inputs = (plan, batch.tail_len, *pack_decode(batch), seen)
    return Step(
        name="decode",
        function=jit_decode(steps),
        args=(*state, *place.everywhere(inputs)),
        unread=frozenset() if model.tie_embeddings else frozenset({"embedding"}),
        read_tokens=contexts.unique_tokens,
    )


def _contexts(
    cache_config: CacheConfig, engine: EngineConfig, threads: int, shared: int, own: int, reserve: int
) -> list[Context]:
    """Contexts as a fork leaves them: one prefix, then a tail each, with room for `reserve` tokens more."""
    cache = KVCache(cache_config, engine.max_tail_pages)
    root = cache.new_context()
    while root.num_tokens < shared:
        count = min(shared - root.num_tokens, cache.tail_room(root))
        cache.reserve(root, count)
        cache.advance(root, [0] * count)
    children = cache.fork(root, threads)
    for child in children:
        cache.reserve(child, own + reserve)
        cache.advance(child, [0] * own)
    return children


def _backend(target: AotTarget, attention: str, kv_dtype: jnp.dtype, page_size: int, head_dim: int) -> str:
    """As the engine chooses, for a device that is not there. Where the engine would fall back to the reference, this
    raises ValueError: who compiles for a device asks for its kernels.
    """
    if attention == "reference":
        return REFERENCE
    try:
        return choose_backend(target.kernels, kv_dtype, page_size, head_dim)
    except ValueError as error:
        raise ValueError(f"attention={attention}: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where arguments lie: over the mesh, or on its one device."""

    mesh: Any
    device: Any

    def _put(self, tree, spec: PartitionSpec):
        one = SingleDeviceSharding(self.device)
        sharding = one if self.mesh is None else NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def param(self, name: str, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if self.mesh is None:
            return self._put(shape, PartitionSpec())
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=param_sharding(self.mesh, name, shape.shape))

    def pages(self, store: KVPages) -> KVPages:
        return self._put(store, PartitionSpec(TENSOR))

    def everywhere(self, inputs: tuple) -> tuple:
        return self._put(inputs, PartitionSpec())


def _on_device(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    assert x.sharding is not None
    return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
