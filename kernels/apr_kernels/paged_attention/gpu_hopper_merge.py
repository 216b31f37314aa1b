"""The merge of partial results as one Mosaic GPU kernel, for head dims that fill a warpgroup.

`merge.merge` reads all P partials that a row might have, in three launches; this reads those it has, in one. A
warpgroup merges one query: its numbers are a vector over the threads, the weights of its partials are scalars.

Letters: R rows, T queries a row, H heads, K KV heads, G = H / K, D head dim, P partials a row, X partials in all.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128
BATCH = 4  # partials whose loads are under way at once
LOWEST = -1e30


def can_merge(head_dim: int) -> bool:
    return head_dim % THREADS == 0


def merge(o, stats, partials, num_queries, num_tokens: int, dtype, *, interpret):
    """Combines what the items' runs left for each row. See `merge.merge`.

    Args:
      o: f32[K, X * T * G, D] values weighted by exp(score - m), not divided by l.
      stats: f32[K, X * T * G, n] m first, l last.
      partials: i32[R, P] of the plan, -1: none.
      num_queries: i32[R]. num_tokens: T. dtype: of the result.
      interpret: the interpreter's parameters, or None.

    Returns:
      o: [R, T, H, D], lse: f32[R, T, H].
    """
    num_rows, max_partials = partials.shape
    num_kv_heads, head_dim = o.shape[0], o.shape[2]
    group = o.shape[1] // (num_rows * max_partials * num_tokens)
    num_heads = num_kv_heads * group
    used = jnp.max(jnp.where(partials >= 0, jnp.arange(max_partials) + 1, 0), axis=1)
    # In place of one that does not exist another of the row is read: memory that nobody wrote may hold NaN.
    coded = jnp.where(partials >= 0, partials, -1 - partials.max(axis=1, keepdims=True))
    kernel = plgpu.kernel(
        functools.partial(
            _kernel, num_tokens=num_tokens, max_partials=max_partials, group=group, interpret=interpret is not None
        ),
        out_type=[
            jax.ShapeDtypeStruct((num_rows, num_tokens, num_heads, head_dim), dtype),
            jax.ShapeDtypeStruct((num_rows, num_tokens, num_heads), jnp.float32),
        ],
        grid=(num_rows * num_tokens * num_heads,),
        grid_names=("query",),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    return kernel(coded.reshape(-1), used, num_queries, stats, o)


def _kernel(
    partials_ref, used_ref, num_queries_ref, stats_ref, o_ref, out_ref, lse_ref,
    *, num_tokens: int, max_partials: int, group: int, interpret: bool,
):  # fmt: skip
    num_heads, head_dim = out_ref.shape[2:]
    query = lax.axis_index("query")
    head = lax.rem(query, num_heads)
    token = lax.rem(lax.div(query, num_heads), num_tokens)
    row = lax.div(query, num_heads * num_tokens)
    kv_head = lax.div(head, group)
    within = token * group + lax.rem(head, group)
    used = jnp.where(token < num_queries_ref[row], used_ref[row], 0)

    def batch(i, carry):
        o, m, l = carry
        found = []
        for j in range(BATCH):
            nth = i * BATCH + j
            partial = partials_ref[row * max_partials + jnp.minimum(nth, max_partials - 1)]
            exists = (nth < used) & (partial >= 0)
            at = jnp.where(partial >= 0, partial, -1 - partial) * (num_tokens * group) + within
            part_m, part_l = stats_ref[kv_head, at, 0], stats_ref[kv_head, at, stats_ref.shape[2] - 1]
            exists = exists & (part_l > 0)
            found.append((jnp.where(exists, part_m, LOWEST), jnp.where(exists, part_l, 0.0), o_ref[kv_head, at]))
        m_new = functools.reduce(jnp.maximum, [part_m for part_m, _, _ in found], m)
        shrink = jnp.exp(m - m_new)
        o, l = o * shrink, l * shrink
        for part_m, part_l, part_o in found:
            weight = jnp.where(part_l > 0, jnp.exp(part_m - m_new), 0.0)
            o, l = o + part_o * weight, l + part_l * weight
        return o, m_new, l

    zeros = jnp.zeros((head_dim,), jnp.float32)
    if not interpret:
        zeros = plgpu.layout_cast(zeros, plgpu.Layout.WG_STRIDED((head_dim,), vec_size=head_dim // THREADS))
    o, m, l = lax.fori_loop(0, lax.div(used + BATCH - 1, BATCH), batch, (zeros, jnp.float32(LOWEST), jnp.float32(0)))
    sees = l > 0
    out_ref[row, token, head] = (o * jnp.where(sees, 1 / l, 0.0)).astype(out_ref.dtype)
    lse_ref[row, token, head] = jnp.where(sees, m + jnp.log(l), -jnp.inf)
