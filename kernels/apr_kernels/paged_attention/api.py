"""Public entry: attention of all rows over the pages their plan gives them."""

from typing import Any

import jax
import jax.numpy as jnp

from apr_kernels.backends import REFERENCE, TPU, implementation, target_of
from apr_kernels.kv_pages import KVPages
from apr_kernels.kv_update.api import check_call
from apr_kernels.plan import Plan


def prepare(plan: Plan, tail_len, num_queries, page_size: int, *, backend: str = REFERENCE):
    """What attention derives from the plan and the lengths, for all layers of a step at once.

    Returns:
      A pytree of arrays, opaque, to be handed to `paged_attention` with the same arguments.
    """
    with jax.named_scope("prepare_attention"):
        plan, tail_len, num_queries = jax.tree.map(jnp.asarray, (plan, tail_len, num_queries))
        return implementation("paged_attention", backend).prepare(plan, tail_len, num_queries, page_size)


def paged_attention(
    q,
    kv_pages: KVPages,
    plan: Plan,
    tail_len,
    num_queries,
    prepared=None,
    *,
    backend: str = REFERENCE,
    interpret: bool = False,
    cores: int | None = None,
):
    """Attends, scaling by D ** -0.5. Call it after `kv_update`, with the same tail_len.

    Query t of a row sees all valid tokens of the items the row reads, and of its own tail those with index
    <= tail_len + t. Each shared item's pages are read once for all its readers.

    Args:
      q: [R, T, H, D] unscaled queries; H is a multiple of the pages' KV heads.
      kv_pages: the layer's pages; unchanged.
      plan: the step's plan.
      tail_len: i32[S] tokens with keys in each tail before this step.
      num_queries: i32[R] valid queries of each row, at most T.
      prepared: what `prepare` returned for this step with the same backend; None: it is called here.
      backend: one of `apr_kernels.backends.BACKENDS`; the pages have the format that `format_for` names.
      interpret: runs a Pallas kernel without its hardware.
      cores: of a TPU that share a kernel's grid, `Target.cores`; None: as many as the device at hand has.

    Returns:
      o: [R, T, H, D] in q's dtype; 0 for queries beyond num_queries and for those that see nothing.
      lse: [R, T, H] log of the sum of exponentials, float32 (float64 for float64 queries); -inf for the same.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or pages that the backend does not support.
    """
    if q.ndim != 4 or q.shape[3] != kv_pages.head_dim:
        raise ValueError(f"q has shape {q.shape}, must be [R, T, H, {kv_pages.head_dim}]")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q has dtype {q.dtype}, must be a floating type")
    if q.shape[2] % kv_pages.num_kv_heads:
        raise ValueError(f"q has {q.shape[2]} heads, must be a multiple of {kv_pages.num_kv_heads} KV heads")
    check_call(kv_pages, plan, tail_len, num_queries, q.shape[0], backend, interpret)
    if prepared is None:
        prepared = prepare(plan, tail_len, num_queries, kv_pages.page_size, backend=backend)
    with jax.named_scope("paged_attention"):
        call = implementation("paged_attention", backend).paged_attention
        options: dict[str, Any] = {} if backend == REFERENCE else {"interpret": interpret}
        if backend == TPU:
            options["cores"] = target_of(jax.devices()[0]).cores if cores is None else cores
        return call(jnp.asarray(q), kv_pages, prepared, jnp.asarray(num_queries), **options)
