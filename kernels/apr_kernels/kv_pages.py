"""The page store of one layer.

Letters: N pages (page 0 is the null page: reads of it are masked, nothing is written to it), P token
positions a page, K KV heads, D head dim, L lanes: the width of a stored token, at least D.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

NULL_PAGE = 0
LANES = 128  # of a TPU register; a narrower minor dimension makes XLA's TPU compiler copy the store

HEAD_MAJOR = "head_major"
LANE_PADDED = "lane_padded"
LANE_PACKED = "lane_packed"
FORMATS = (HEAD_MAJOR, LANE_PADDED, LANE_PACKED)
QUANTISED = ("int8", "float8_e4m3fn")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v", "k_scale", "v_scale"),
    meta_fields=("page_size", "num_kv_heads", "head_dim", "format"),
)
@dataclasses.dataclass(frozen=True)
class KVPages:
    """Keys and values of one layer, by page. Opaque to everything outside this package; donated at every
    entry.

    Heads lead in all formats, so that a page of a head is contiguous and a gather of pages is already the
    batched operand of both matrix products. "head_major" stores D lanes a token; "lane_padded" rounds D up to
    a multiple of 128, the rest being zeros; "lane_packed" keeps the value beside the key, 2 D lanes that are
    a multiple of 128.

    Attributes:
      k: [K, N, P, L] rotated keys; key and value in "lane_packed".
      v: [K, N, P, L] values; None in "lane_packed".
      k_scale, v_scale: f32[K, N, P] what a stored token's numbers are multiplied with; None unless quantised. In
        the lane formats k_scale is f32[K, N, 1, S], S = max(128, 2 P): the scales of keys in lanes [0, P), of
        values in lanes [S / 2, S / 2 + P), zeros elsewhere; v_scale is None. A minor dimension of P would be
        copied as one of D is, and a page's scales are one copy.
      page_size: P.
      num_kv_heads: K.
      head_dim: D.
      format: one of FORMATS.
    """

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    page_size: int
    num_kv_heads: int
    head_dim: int
    format: str = HEAD_MAJOR

    @property
    def num_pages(self) -> int:
        """Pages held, the null page among them."""
        return self.k.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        return self.k.dtype

    @property
    def bytes(self) -> int:
        """Bytes of keys, values and scales together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def make_kv_pages(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype, format: str = HEAD_MAJOR
) -> KVPages:
    """Returns a zeroed store of num_pages pages, the null page among them.

    Args:
      dtype: a floating type, or int8 or float8_e4m3fn, which come with a scale a token and head.

    Raises:
      ValueError: a size below 1, fewer than 2 pages, a dtype or format that is not known, or a head_dim that
        cannot be packed.
    """
    sizes = {"page_size": page_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, must be >= 1")
    if num_pages < 2:
        raise ValueError(f"num_pages is {num_pages}, must be >= 2 (page 0 is the null page)")
    dtype = jnp.dtype(dtype)
    if not (is_quantised(dtype) or jnp.issubdtype(dtype, jnp.floating)):
        raise ValueError(f"dtype is {dtype}, must be a floating type or one of {', '.join(QUANTISED)}")
    shape = (num_kv_heads, num_pages, page_size)
    width = _width(head_dim, format)

    def zeros():
        return jnp.zeros((*shape, width), dtype)

    v = None if format == LANE_PACKED else zeros()
    k_scale = v_scale = None
    if is_quantised(dtype):
        k_scale = v_scale = jnp.ones(shape, jnp.float32)
        k_scale, v_scale = _place_scales(k_scale, v_scale, format)
    return KVPages(zeros(), v, k_scale, v_scale, page_size, num_kv_heads, head_dim, format)


def is_quantised(dtype) -> bool:
    """Whether pages of this dtype carry scales."""
    return jnp.dtype(dtype).name in QUANTISED


def quantise(x, dtype):
    """Rounds x: [..., D] to `dtype` with one scale for the last dimension.

    Returns:
      Numbers [..., D] of `dtype` and scales f32[...], so that their product is about x. The largest number of
      a token becomes the largest of the dtype (127 or 448).
    """
    x = x.astype(jnp.float32)
    dtype = jnp.dtype(dtype)
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    scale = jnp.where(scale > 0, scale, 1.0)
    scaled = jnp.clip(x / scale[..., None], -largest, largest)
    return (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype), scale


def convert_pages(kv_pages: KVPages, format: str) -> KVPages:
    """The same tokens in another format; copies everything. For tests and for moving between backends."""
    k, v = kv_pages.k, kv_pages.v
    width = kv_pages.head_dim
    if kv_pages.format == LANE_PACKED:
        k, v = k[..., :width], k[..., width : 2 * width]
    else:
        k, v = k[..., :width], v[..., :width]
    if format == LANE_PACKED:
        _width(width, format)
        k, v = jnp.concatenate([k, v], axis=-1), None
    else:
        padding = [(0, 0)] * 3 + [(0, _width(width, format) - width)]
        k, v = jnp.pad(k, padding), jnp.pad(v, padding)
    k_scale, v_scale = kv_pages.k_scale, kv_pages.v_scale
    if k_scale is not None:
        if kv_pages.format != HEAD_MAJOR:
            k_scale, v_scale = (
                k_scale[:, :, 0, first : first + kv_pages.page_size] for first in (0, k_scale.shape[-1] // 2)
            )
        k_scale, v_scale = _place_scales(k_scale, v_scale, format)
    return dataclasses.replace(kv_pages, k=k, v=v, k_scale=k_scale, v_scale=v_scale, format=format)


def lane_scales(k_scale, v_scale):
    """Scales [..., P] of keys and of values as the lane formats keep them: [..., S]."""
    page_size = k_scale.shape[-1]
    half = max(LANES, 2 * page_size) // 2
    padding = [(0, 0)] * (k_scale.ndim - 1) + [(0, half - page_size)]
    return jnp.concatenate([jnp.pad(k_scale, padding), jnp.pad(v_scale, padding)], axis=-1)


def _place_scales(k_scale, v_scale, format: str):
    """k_scale and v_scale of a format from f32[K, N, P] each."""
    if format == HEAD_MAJOR:
        return k_scale, v_scale
    return lane_scales(k_scale, v_scale)[:, :, None], None


def _width(head_dim: int, format: str) -> int:
    """L of a format."""
    if format == HEAD_MAJOR:
        return head_dim
    if format == LANE_PADDED:
        return -(-head_dim // LANES) * LANES
    if format == LANE_PACKED:
        if 2 * head_dim % LANES:
            raise ValueError(f"head_dim is {head_dim}: key and value cannot be packed, 2 * {head_dim} % {LANES} != 0")
        return 2 * head_dim
    raise ValueError(f"format is {format!r}, must be one of {', '.join(FORMATS)}")


def read_pages(kv_pages: KVPages, page_ids: jax.Array):
    """Reads whole pages, for a copy to host memory.

    Args:
      kv_pages: the store; unchanged.
      page_ids: i32[n]; ids out of range are clamped.

    Returns:
      A pytree of arrays [n, ...], to be handed to `write_pages` unchanged.
    """
    with jax.named_scope("read_pages"):
        return jax.tree.map(
            lambda pages: jnp.moveaxis(jnp.take(pages, page_ids, axis=1, mode="clip"), 1, 0), _arrays(kv_pages)
        )


def write_pages(kv_pages: KVPages, page_ids: jax.Array, data) -> KVPages:
    """Writes whole pages back. Donate kv_pages: the write is then in place.

    Args:
      kv_pages: the store.
      page_ids: i32[n], distinct but for ids out of range, which are dropped, as is the null page.
      data: what `read_pages` returned for n pages.
    """
    with jax.named_scope("write_pages"):
        page_ids = jnp.where(page_ids > NULL_PAGE, page_ids, kv_pages.num_pages)
        written = jax.tree.map(
            lambda pages, new: pages.at[:, page_ids].set(jnp.moveaxis(new, 0, 1).astype(pages.dtype), mode="drop"),
            _arrays(kv_pages),
            data,
        )
        return dataclasses.replace(kv_pages, **written)


def _arrays(kv_pages: KVPages) -> dict[str, Any]:
    return {name: getattr(kv_pages, name) for name in ("k", "v", "k_scale", "v_scale")}
