"""The merge of partial results as one kernel, for NVIDIA GPUs from compute capability 8.0: Pallas, Triton.

XLA gathers a row's partials to memory, all P columns of them, before it adds them up: at 64 columns, of which a row
uses few, more bytes than the attention itself reads. Here each program goes over the columns that its row uses,
in the plan's order, so that the bits never vary, and writes the result where it belongs.

Letters: R rows, T queries a row, H heads, K KV heads, G = H / K, D head dim, P partials a row, X partials in all,
M queries a program.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

MAX_QUERIES = 16
NOTHING_SEEN = -1e30  # finite, as -inf minus -inf is NaN


def merge(o, m, l, partials, num_queries, num_tokens: int, dtype, *, interpret: bool = False):
    """See `apr_kernels.paged_attention.merge.merge`. Of a row's partials, those of queries from num_queries on may
    hold anything, too."""
    num_kv_heads, _, queries, head_dim = o.shape
    num_rows, num_columns = partials.shape
    group = queries // num_tokens
    rows = min(pl.next_power_of_2(queries), MAX_QUERIES)
    # The columns of a row up to its last partial.
    num_used = jnp.max(jnp.where(partials >= 0, jnp.arange(1, num_columns + 1), 0), axis=1).astype(jnp.int32)
    shape = (num_rows, num_tokens, num_kv_heads * group)
    call = pl.pallas_call(
        functools.partial(merge_partials_kernel, rows=rows, group=group),
        grid=(num_rows, pl.cdiv(queries, rows), num_kv_heads),
        out_shape=[jax.ShapeDtypeStruct((*shape, head_dim), dtype), jax.ShapeDtypeStruct(shape, jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="merge_partials",
    )
    return tuple(call(o, m, l, partials, num_used, num_queries.astype(jnp.int32)))


def merge_partials_kernel(
    o_ref, m_ref, l_ref, partials_ref, num_used_ref, num_queries_ref, out_ref, lse_ref, *, rows, group
):
    """One program: M queries of a row and KV head. All arrays are whole, in global memory."""
    row, block, head = (pl.program_id(axis) for axis in range(3))
    num_partials, queries, head_dim = o_ref.shape[1:]
    query = block * rows + jnp.arange(rows)
    token = query // group
    is_live = (query < queries) & (token < num_queries_ref[row])
    lane = jnp.arange(pl.next_power_of_2(head_dim))
    shape = (rows, lane.shape[0])

    def lanes(mask):
        """A mask of queries as one of their numbers."""
        return jnp.broadcast_to(mask[:, None] & (lane < head_dim)[None, :], shape)

    def spread(*index):
        return [jnp.broadcast_to(each[:, None], shape) for each in index] + [jnp.broadcast_to(lane[None, :], shape)]

    def column(p, state):
        top, total, out = state
        partial = partials_ref[row, p]
        reads = is_live & (partial >= 0)
        partial = jnp.clip(partial, 0, num_partials - 1)
        l = plgpu.load(l_ref.at[head, partial, query], mask=reads, other=0)
        sees = reads & (l > 0)
        m = plgpu.load(m_ref.at[head, partial, query], mask=sees, other=NOTHING_SEEN)
        o = plgpu.load(o_ref.at[head, partial, *spread(query)], mask=lanes(sees), other=0)
        new_top = jnp.maximum(top, m)
        shrink, factor = jnp.exp(top - new_top), jnp.exp(m - new_top)
        return new_top, total * shrink + l * factor, out * shrink[:, None] + o * factor[:, None]

    zeros = jnp.zeros(rows, jnp.float32)
    state = (zeros + NOTHING_SEEN, zeros, jnp.zeros(shape, jnp.float32))
    top, total, out = lax.fori_loop(0, num_used_ref[row], column, state)
    sees = total > 0
    safe = jnp.where(sees, total, 1)
    q_head = head * group + query % group
    out = (out / safe[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref.at[row, *spread(token, q_head)], out, mask=lanes(query < queries))
    lse = jnp.where(sees, top + jnp.log(safe), -jnp.inf)
    plgpu.store(lse_ref.at[row, token, q_head], lse, mask=query < queries)
