"""Runs of one case: our kernel on the stores it rotates over, checked against the reference and timed.

Letters: R rows, T queries a row, H heads, K KV heads, D head dim, L stores, V variants of a case on pages of a store.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from apr_kernels.backends import REFERENCE, format_for
from apr_kernels.kv_pages import HEAD_MAJOR, KVPages, convert_pages, is_quantised, quantise
from apr_kernels.paged_attention import paged_attention, prepare
from apr_kernels.plan import Plan
from jax import lax
from kernel_cases import KernelCase
from kernel_layout import Layout, build_plan, lay_out, on_other_pages, page_maps
from kernel_timing import Timing, time_passes

MAX_STORES = 36  # layers' stores that calls rotate over, as a model has; small cases have several variants in each
PASS_S = 5e-3  # device time of a pass, by the roofline: the host's launch of the next one hides behind it
CALL_S = 4e-6  # the least that a call is expected to take
SHORT_CALL_S = 100e-6
MAX_CALLS = 4096  # of a pass
MAX_PREFILL_PARTIALS = 4  # a row, as the engine's: one is as large as a chunk's output
NO_SHARING = 2**30  # min_shared_tokens that no run reaches
# A result's error, as a part of the largest output: twice what rounding weights and output to the dtype costs.
ERROR_BOUND = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all cases share.

    Attributes:
      page_size, num_heads, num_kv_heads, head_dim: sizes. dtype: of queries. kv_dtype: of pages.
      item_pages, max_partials, min_shared_tokens: of the plans; target_runs: each is tried, the best is reported.
      repeats, min_s: of timings. seed: of data and page ids.
      backend, interpret: of our kernel.
      rotate_bytes: pages that calls rotate over, at least.
      copy_bytes_per_s, flops_per_s: measured.
    """

    page_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    kv_dtype: str
    item_pages: int
    max_partials: int
    min_shared_tokens: int
    target_runs: tuple[int, ...]
    repeats: int
    min_s: float
    seed: int
    backend: str
    interpret: bool
    rotate_bytes: int
    copy_bytes_per_s: float
    flops_per_s: float

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values, scales too, in one layer."""
        scale = 4 if is_quantised(self.kv_dtype) else 0
        return 2 * self.num_kv_heads * (self.head_dim * jnp.dtype(self.kv_dtype).itemsize + scale)

    def bounds(self, case: KernelCase) -> tuple[int, int, float]:
        """Unique bytes, floating-point operations, and the least seconds they take: the roofline."""
        unique = case.unique_tokens * self.token_bytes
        flops = 4 * case.visible_tokens * self.num_heads * self.head_dim
        return unique, flops, max(unique / self.copy_bytes_per_s, flops / self.flops_per_s)


class CaseRun:
    """One case's stores, queries and page ids; everything measured for it reads these.

    Attributes:
      stores: L layers' pages in the backend's format.
      maps: i32[V, num_pages] where the variants' pages lie in each store.
      q: [R, T, H, D].
    """

    def __init__(self, case: KernelCase, settings: Settings):
        self.case, self.settings = case, settings
        self.layout: Layout = lay_out(case, settings.page_size)
        unique, _, self.roofline_s = settings.bounds(case)
        num_stores = max(1, min(MAX_STORES, -(-settings.rotate_bytes // unique)))
        num_variants = max(1, -(-settings.rotate_bytes // (unique * num_stores)))
        self.maps = page_maps(self.layout.num_pages, num_variants, np.random.default_rng(settings.seed))
        num_pages = num_variants * (self.layout.num_pages - 1) + 1
        key = jax.random.key(settings.seed)
        make = jax.jit(functools.partial(random_pages, settings, num_pages))
        self.stores = [make(jax.random.fold_in(key, i)) for i in range(num_stores)]
        shape = (case.num_rows, case.num_queries, settings.num_heads, settings.head_dim)
        self.q = jax.random.normal(jax.random.fold_in(key, num_stores), shape, settings.dtype)
        self.tail_len = jnp.full(case.num_rows, case.tail_len - case.num_queries, jnp.int32)
        self.num_queries = jnp.full(case.num_rows, case.num_queries, jnp.int32)

    @property
    def num_calls(self) -> int:
        """Calls of a pass: a multiple of V times those of a round."""
        rotation = self.round_calls * len(self.maps)
        wanted = min(MAX_CALLS, PASS_S / max(self.roofline_s, CALL_S))
        return rotation * max(1, round(wanted / rotation))

    @property
    def round_calls(self) -> int:
        """Calls that share what a backend derives from the plan: about a model's layers, where that would show."""
        turns = -(-MAX_STORES // len(self.stores)) if self.roofline_s < SHORT_CALL_S else 1
        return turns * len(self.stores)

    @property
    def rotated_bytes(self) -> int:
        return len(self.stores) * len(self.maps) * self.settings.bounds(self.case)[0]

    def plan(self, target_runs: int, min_shared_tokens: int) -> Plan:
        """On pages of no store yet: see `on_other_pages`."""
        return build_plan(
            self.case,
            self.settings.page_size,
            item_pages=self.settings.item_pages,
            target_runs=target_runs,
            max_partials=min(self.settings.max_partials, MAX_PREFILL_PARTIALS if self.case.num_queries > 1 else 2**30),
            min_shared_tokens=min_shared_tokens,
        )

    def time_calls(self, call, prepared, stores=None) -> Timing:
        """Times `o = call(q, store, prepared)`, o being the next call's q, in turn over all stores and variants.

        Args:
          prepared: a pytree of arrays [V, ...]; a call gets one variant's.
          stores: the same pages in another form, if the call wants one.
        """
        run, stores = self.loop(call), self.stores if stores is None else stores
        return time_passes(
            lambda q: run(q, stores, prepared),
            self.q,
            self.num_calls,
            repeats=self.settings.repeats,
            min_s=self.settings.min_s,
        )

    def loop(self, call):
        """A pass, jitted: (q, stores, prepared of all variants) -> q after `num_calls` calls."""
        num_calls, round_calls, num_variants = self.num_calls, self.round_calls, len(self.maps)
        call = jax.jit(call)  # traced and lowered once, not once a store

        @jax.jit
        def run(q, stores, prepared):
            def body(i, q):
                step = jax.tree.map(lambda each: each[i % num_variants] if num_variants > 1 else each[0], prepared)
                for each in range(round_calls):
                    q = call(q, stores[each % len(stores)], step)
                return q

            return lax.fori_loop(0, num_calls // round_calls, body, q)

        return run

    def attend(self, plan: Plan, backend: str):
        """Our kernel as a `call` of `time_calls`, and what is prepared for it, of all variants."""
        lengths, page_size = (self.tail_len, self.num_queries), self.settings.page_size
        on_device = jax.tree.map(jnp.asarray, plan)

        def prepare_one(page_map):
            return prepare(on_other_pages(on_device, page_map), *lengths, page_size, backend=backend)

        def call(q, store, prepared):
            options: dict[str, Any] = {"backend": backend, "interpret": self.settings.interpret}
            return paged_attention(q, store, on_device, *lengths, prepared, **options)[0]

        return call, jax.jit(lambda maps: lax.map(prepare_one, maps))(self.maps)

    def once(self, call, prepared, q=None, stores=None):
        """The result on the first store and variant; q and stores as in `time_calls`, if not its own."""
        store = self.stores[0] if stores is None else stores[0]
        return jax.jit(call)(self.q if q is None else q, store, first_of(prepared))

    def reference(self) -> jax.Array:
        """The float32 result of the reference on the first store and variant: [R, T, H, D]."""
        plan = self.plan(1, self.settings.min_shared_tokens)
        call, prepared = self.attend(plan, REFERENCE)
        store = self.stores[0]
        if store.format != HEAD_MAJOR:
            store = convert_pages(store, HEAD_MAJOR)
        return jax.jit(call)(self.q.astype(jnp.float32), store, first_of(prepared))

    def error_of(self, o, expected, slack: float = 1.0) -> tuple[float, bool]:
        """The largest difference, and whether it is within slack times ERROR_BOUND; NaN is not."""
        error = float(jnp.max(jnp.abs(o.astype(jnp.float32) - expected)))
        bound = ERROR_BOUND[self.settings.dtype] * float(jnp.max(jnp.abs(expected)))
        return error, error <= slack * bound

    def measure(
        self, min_shared_tokens: int, expected, *, timed: bool = True, target_runs: tuple[int, ...] = ()
    ) -> dict[str, Any]:
        """Checks our kernel and times it, at the best of target_runs (the settings' if none are given)."""
        best: dict[str, Any] | None = None
        for num_runs in target_runs or self.settings.target_runs:
            plan = self.plan(num_runs, min_shared_tokens)
            call, prepared = self.attend(plan, self.settings.backend)
            error, correct = self.error_of(self.once(call, prepared), expected)
            found = {
                "us": None,
                "max_error": error if np.isfinite(error) else None,
                "correct": correct,
                "target_runs": num_runs,
                "num_items": plan.num_items,
                "partials_per_row": plan.partials.shape[1],
            }
            if not correct:
                return found
            if timed:
                found |= as_us(self.time_calls(call, prepared))
            if best is None or (timed and found["us"] < best["us"]):
                best = found
        assert best is not None, "target_runs holds a number"
        return best


def as_us(timing: Timing) -> dict[str, float]:
    return {"us": 1e6 * timing.median, "us_min": 1e6 * timing.least, "us_max": 1e6 * timing.most}


def first_of(prepared):
    """The first variant's."""
    return jax.tree.map(lambda each: each[0], prepared)


def random_pages(settings: Settings, num_pages: int, key) -> KVPages:
    shape = (settings.num_kv_heads, num_pages, settings.page_size, settings.head_dim)
    k, v = (jax.random.normal(each, shape, settings.dtype) for each in jax.random.split(key))
    k_scale = v_scale = None
    if is_quantised(settings.kv_dtype):
        (k, k_scale), (v, v_scale) = quantise(k, settings.kv_dtype), quantise(v, settings.kv_dtype)
    sizes = (settings.page_size, settings.num_kv_heads, settings.head_dim)
    pages = KVPages(k.astype(settings.kv_dtype), v.astype(settings.kv_dtype), k_scale, v_scale, *sizes)
    wanted = format_for(settings.backend, settings.head_dim)
    return pages if wanted == HEAD_MAJOR else convert_pages(pages, wanted)
