"""Merges partial softmax results by row: a gather, so that the order, and with it the bits, never varies.

Letters: R rows, T queries a row, H heads, K KV heads, G = H / K, D head dim, P partials a row, X partials in all.
"""

import jax.numpy as jnp


def merge(o, m, l, partials, num_queries, num_tokens: int, dtype):
    """Combines what the items' runs left for each row.

    Args:
      o: f32[K, X, T * G, D] values weighted by exp(score - m), not divided by l.
      m, l: f32[K, X, T * G] the maximum of the scores (-inf or very low where nothing was seen) and the sum of
        exponentials, 0 where nothing was seen. Partials that no row lists may hold anything, NaN included.
      partials: i32[R, P] of the plan, -1: none.
      num_queries: i32[R]. num_tokens: T.
      dtype: of the result.

    Returns:
      o: [R, T, H, D] in `dtype`, lse: f32[R, T, H]; 0 and -inf for queries that see nothing.
    """
    num_kv_heads, _, queries = o.shape[:3]
    num_rows, group = partials.shape[0], queries // num_tokens
    index = jnp.maximum(partials, 0)
    l = jnp.where((partials >= 0)[None, ..., None], l[:, index], 0)  # [K, R, P, T * G]
    sees = l > 0
    m = jnp.where(sees, m[:, index], -jnp.inf)
    top = m.max(2)
    factor = jnp.exp(m - jnp.where(top == -jnp.inf, 0, top)[:, :, None])
    total = (factor * l).sum(2)  # [K, R, T * G]
    o = (factor[..., None] * jnp.where(sees[..., None], o[:, index], 0)).sum(2)

    def by_row(x):
        """[K, R, T * G, ...] as [R, T, H, ...]."""
        x = x.reshape(num_kv_heads, num_rows, num_tokens, group, *x.shape[3:])
        return jnp.moveaxis(x, 0, 2).reshape(num_rows, num_tokens, num_kv_heads * group, *x.shape[4:])

    valid = (jnp.arange(num_tokens) < num_queries[:, None])[..., None]  # [R, T, 1]
    total, top, o = by_row(total), by_row(top), by_row(o)
    valid &= total > 0
    safe = jnp.where(valid, total, 1)
    o = jnp.where(valid[..., None], o / safe[..., None], 0).astype(dtype)
    return o, jnp.where(valid, top + jnp.log(safe), -jnp.inf)
