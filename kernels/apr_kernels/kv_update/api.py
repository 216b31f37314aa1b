"""Public entry: write new keys and values into pages, in place."""

import jax
import jax.numpy as jnp

from apr_kernels.backends import REFERENCE, format_for, implementation, unlisted
from apr_kernels.kv_pages import KVPages
from apr_kernels.plan import Plan, check_shapes


def check_call(
    kv_pages: KVPages, plan: Plan, tail_len, num_queries, num_rows: int, backend: str, interpret: bool
) -> None:
    """Checks what both entries share: static shapes, and, unless interpreted, pages that the backend supports.

    Raises:
      ValueError: with what was found and expected.
    """
    check_shapes(plan)
    if num_rows != plan.num_rows:
        raise ValueError(f"{num_rows} rows given, the plan has {plan.num_rows}")
    for name, array, size in (("tail_len", tail_len, plan.num_slots), ("num_queries", num_queries, num_rows)):
        if array.shape != (size,) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, must be integer [{size}]")
    expected = format_for(backend, kv_pages.head_dim)
    if kv_pages.format != expected:
        raise ValueError(f"pages of format {kv_pages.format!r}: backend {backend!r} needs {expected!r}")
    reason = unlisted(backend, kv_pages.dtype, kv_pages.page_size, kv_pages.head_dim)
    if reason is not None and not interpret:
        raise ValueError(f"backend {backend!r}: {reason}")


def prepare(plan: Plan, tail_len, num_queries, num_tokens: int, kv_pages: KVPages, *, backend: str = REFERENCE):
    """What the update derives from the plan and the lengths, for all layers of a step at once.

    Args:
      num_tokens: T.
      kv_pages: the pages of any layer; only their sizes are used.

    Returns:
      A pytree of arrays, opaque, to be handed to `kv_update` with the same arguments.
    """
    with jax.named_scope("prepare_update"):
        plan, tail_len, num_queries = jax.tree.map(jnp.asarray, (plan, tail_len, num_queries))
        call = implementation("kv_update", backend).prepare
        return call(plan, tail_len, num_queries, num_tokens, kv_pages.page_size, kv_pages.num_pages)


def kv_update(
    kv_pages: KVPages,
    k,
    v,
    plan: Plan,
    tail_len,
    num_queries,
    prepared=None,
    *,
    backend: str = REFERENCE,
    interpret: bool = False,
) -> KVPages:
    """Appends each row's new keys and values to the tail of the slot it serves.

    Token t of row r becomes token tail_len[slot] + t of the tail of slot plan.row_slot[r]. Tokens t >=
    num_queries[r] and rows of padding write nothing, nor does a token whose page is not reserved. Writing a
    page's first slot zeroes its other slots: unused slots are finite. Donate kv_pages: the write is in place.

    Args:
      kv_pages: the layer's pages.
      k: [R, T, K, D] rotated keys.
      v: [R, T, K, D] values.
      plan: the step's plan; `row_slot` and `tail_pages` are used.
      tail_len: i32[S] tokens with keys in each tail before this call.
      num_queries: i32[R] valid tokens of each row, at most T.
      prepared: what `prepare` returned for this step with the same backend; None: it is called here.
      backend: one of `apr_kernels.backends.BACKENDS`; the pages have the format that `format_for` names.
      interpret: runs a Pallas kernel without its hardware.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or pages that the backend does not support.
    """
    expected = (plan.num_rows, k.shape[1], kv_pages.num_kv_heads, kv_pages.head_dim)
    for name, array in (("k", k), ("v", v)):
        if array.ndim != 4 or array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}, must be {expected}")
    check_call(kv_pages, plan, tail_len, num_queries, k.shape[0], backend, interpret)
    if prepared is None:
        prepared = prepare(plan, tail_len, num_queries, k.shape[1], kv_pages, backend=backend)
    with jax.named_scope("kv_update"):
        options = {} if backend == REFERENCE else {"interpret": interpret}
        return implementation("kv_update", backend).kv_update(
            kv_pages, jnp.asarray(k), jnp.asarray(v), prepared, **options
        )
