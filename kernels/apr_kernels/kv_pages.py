"""The page store of one layer.

Letters: N pages (page 0 is the null page: reads of it are masked, nothing is written to it), P token
positions a page, K KV heads, D head dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

NULL_PAGE = 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v"),
    meta_fields=("page_size", "num_kv_heads", "head_dim", "format"),
)
@dataclasses.dataclass(frozen=True)
class KVPages:
    """Keys and values of one layer, by page. Opaque to everything outside this package; donated at every
    entry.

    Attributes:
      k: [K, N, P, D] rotated keys.
      v: [K, N, P, D] values.
      page_size: P.
      num_kv_heads: K.
      head_dim: D.
      format: the name of the layout; "head_major" is the one of the plain-JAX kernels. Heads lead, so that a
        gather of pages is already the batched operand of both matrix products, with no transpose.
    """

    k: jax.Array
    v: jax.Array
    page_size: int
    num_kv_heads: int
    head_dim: int
    format: str = "head_major"

    @property
    def num_pages(self) -> int:
        """Pages held, the null page among them."""
        return self.k.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        return self.k.dtype

    @property
    def bytes(self) -> int:
        """Bytes of keys and values together."""
        return 2 * self.k.size * self.k.dtype.itemsize


def make_kv_pages(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype) -> KVPages:
    """Returns a zeroed store of num_pages pages, the null page among them.

    Raises:
      ValueError: a size below 1, fewer than 2 pages, or a dtype that is not floating.
    """
    sizes = {"page_size": page_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, must be >= 1")
    if num_pages < 2:
        raise ValueError(f"num_pages is {num_pages}, must be >= 2 (page 0 is the null page)")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype}, must be a floating type")
    shape = (num_kv_heads, num_pages, page_size, head_dim)
    return KVPages(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), page_size, num_kv_heads, head_dim)


def read_pages(kv_pages: KVPages, page_ids: jax.Array):
    """Reads whole pages, for a copy to host memory.

    Args:
      kv_pages: the store; unchanged.
      page_ids: i32[n]; ids out of range are clamped.

    Returns:
      A pytree of arrays [n, ...], to be handed to `write_pages` unchanged.
    """
    with jax.named_scope("read_pages"):
        return {
            name: jnp.moveaxis(jnp.take(pages, page_ids, axis=1, mode="clip"), 1, 0)
            for name, pages in (("k", kv_pages.k), ("v", kv_pages.v))
        }


def write_pages(kv_pages: KVPages, page_ids: jax.Array, data) -> KVPages:
    """Writes whole pages back. Donate kv_pages: the write is then in place.

    Args:
      kv_pages: the store.
      page_ids: i32[n], distinct but for ids out of range, which are dropped, as is the null page.
      data: what `read_pages` returned for n pages.
    """
    with jax.named_scope("write_pages"):
        page_ids = jnp.where(page_ids > NULL_PAGE, page_ids, kv_pages.num_pages)
        k, v = (
            pages.at[:, page_ids].set(jnp.moveaxis(data[name], 0, 1).astype(pages.dtype), mode="drop")
            for name, pages in (("k", kv_pages.k), ("v", kv_pages.v))
        )
        return dataclasses.replace(kv_pages, k=k, v=v)
