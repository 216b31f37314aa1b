"""The one place where threads meet: the paged `attend` that the decoder calls under `jax.vmap`.

The decoder speaks of one thread; `vmap` adds the thread axis. This function's batching rule receives all rows at
once, so that a page several rows read is read once for all of them, and hands the pages back unbatched.
Letters: R rows, T tokens a row, H heads, K KV heads, Dh head_dim, S slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
from apr_kernels.backends import REFERENCE
from apr_kernels.kv_pages import KVPages
from apr_kernels.kv_update import api as update_api
from apr_kernels.paged_attention import api as attention_api
from apr_kernels.plan import Plan
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec

from apr_jax.models.decoder import Attend
from apr_jax.models.sharding import TENSOR


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which kernels an engine runs, and over which devices.

    Attributes:
      backend: one of `apr_kernels.backends.BACKENDS`.
      mesh: heads are split over its one axis; None: one device.
      interpret: runs Pallas kernels without their hardware.
      cores: of a TPU that share a kernel's grid; None: as many as the device at hand has.
    """

    backend: str = REFERENCE
    mesh: Mesh | None = None
    interpret: bool = False
    cores: int | None = None


def make_attend(
    kernels: Kernels,
    plan: Plan,
    tail_len: jax.Array,
    num_queries: jax.Array,
    num_tokens: int,
    kv_pages: KVPages,
) -> Attend:
    """The decoder's `attend` for one forward pass of all rows of `plan`.

    Args:
      tail_len: i32[S] tokens with keys in each slot's tail before this pass.
      num_queries: i32[R] valid tokens of each row.
      num_tokens: T, tokens of a row.
      kv_pages: any layer's pages; only their sizes are used.
    """
    backend = kernels.backend
    update = update_api.prepare(plan, tail_len, num_queries, num_tokens, kv_pages, backend=backend)
    attention = attention_api.prepare(plan, tail_len, num_queries, kv_pages.page_size, backend=backend)

    def on_device(q, k, v, kv_pages, step):
        """All rows; a device's own heads."""
        plan, tail_len, num_queries, update, attention = step
        num_kv_heads = kv_pages.num_kv_heads
        kv_pages = dataclasses.replace(kv_pages, num_kv_heads=k.shape[2])
        options = {"backend": backend, "interpret": kernels.interpret}
        kv_pages = update_api.kv_update(kv_pages, k, v, plan, tail_len, num_queries, update, **options)
        o, _ = attention_api.paged_attention(
            q, kv_pages, plan, tail_len, num_queries, attention, cores=kernels.cores, **options
        )
        return o, dataclasses.replace(kv_pages, num_kv_heads=num_kv_heads)

    def all_rows(q, k, v, kv_pages, step):
        if kernels.mesh is None:
            return on_device(q, k, v, kv_pages, step)
        heads, pages = PartitionSpec(None, None, TENSOR), PartitionSpec(TENSOR)
        sharded = jax.shard_map(
            on_device,
            mesh=kernels.mesh,
            in_specs=(heads, heads, heads, pages, PartitionSpec()),
            out_specs=(heads, pages),
            check_vma=False,  # a Pallas call does not say over which axes its results vary
        )
        return sharded(q, k, v, kv_pages, step)

    @custom_vmap
    def one_thread(q, k, v, kv_pages, step):
        if step[0].num_rows != 1:
            return jnp.zeros_like(q), kv_pages  # traced under vmap for its shapes; the rule below replaces it
        o, kv_pages = all_rows(q[None], k[None], v[None], kv_pages, step)
        return o[0], kv_pages

    @one_thread.def_vmap
    def rule(axis_size, in_batched, q, k, v, kv_pages, step):
        assert all(in_batched[:3]), "q, k and v must all carry the thread axis"
        assert not any(jax.tree.leaves(in_batched[3:])), "pages, plan and lengths are shared by all threads"
        not_batched = jax.tree.map(lambda _: False, in_batched[3])
        return all_rows(q, k, v, kv_pages, step), (True, not_batched)

    step = (plan, tail_len, num_queries, update, attention)
    return lambda q, k, v, cache: one_thread(q, k, v, cache, step)
