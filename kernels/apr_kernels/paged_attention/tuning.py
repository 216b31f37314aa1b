"""What each backend of paged attention supports, and the block sizes it runs with."""

import dataclasses
import re

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

from apr_kernels.backends import GPU_HOPPER, GPU_TRITON, REFERENCE, TPU, Target

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128)

# backend -> (page dtypes, page sizes, head dims)
SUPPORTED: dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = {
    TPU: (("bfloat16", "float32", "int8", "float8_e4m3fn"), PAGE_SIZES, HEAD_DIMS),
    GPU_HOPPER: (("bfloat16",), PAGE_SIZES, HEAD_DIMS),
    GPU_TRITON: (("bfloat16", "float32", "int8", "float8_e4m3fn"), PAGE_SIZES, HEAD_DIMS),
}


def unsupported(backend: str, target: Target, kv_dtype, page_size: int, head_dim: int) -> str | None:
    """Why a backend cannot attend to these pages on a target; None where it can."""
    reason = unlisted(backend, kv_dtype, page_size, head_dim)
    if reason is not None:
        return reason
    is_float8 = jnp.dtype(kv_dtype).name == "float8_e4m3fn"
    if is_float8 and target.platform == "cuda" and target.compute_capability < (8, 9):
        return "float8_e4m3fn needs compute capability 8.9"
    return _unknown_card(target.kind) if backend == GPU_TRITON else None


def unlisted(backend: str, kv_dtype, page_size: int, head_dim: int) -> str | None:
    """Why a backend cannot attend to these pages on any target; None where it can."""
    if backend == REFERENCE:
        return None
    dtypes, page_sizes, head_dims = SUPPORTED[backend]
    name = jnp.dtype(kv_dtype).name
    for what, value, known in (
        ("dtype", name, dtypes),
        ("page_size", page_size, page_sizes),
        ("head_dim", head_dim, head_dims),
    ):
        if value not in known:
            return f"{what} {value}, must be one of {', '.join(map(str, known))}"
    return None


def _unknown_card(kind: str) -> str | None:
    """From JAX 0.11 on, Pallas-Triton lowers for the cards of a list only (not for "NVIDIA L40S")."""
    known = [version.value for version in getattr(triton, "GpuVersion", ())]
    if not known or any(re.search(rf"\b{re.escape(name)}\b", kind) for name in known):
        return None
    return f"Pallas-Triton of JAX {jax.__version__} does not know {kind}, that of JAX 0.10.2 does"


@dataclasses.dataclass(frozen=True)
class HopperBlocks:
    """Sizes of the Hopper kernel.

    Attributes:
      tile: tokens a step of the softmax takes; a multiple or a divisor of the page size.
      stages: tiles of keys and of values in shared memory.
      consumers: warpgroups that compute, 64 queries each.
      consumer_registers, producer_registers: a thread. With the launch's equal share, of 64k in all.
      ctas: of the persistent grid, one a multiprocessor.
    """

    tile: int
    stages: int
    consumers: int
    consumer_registers: int = 232
    producer_registers: int = 40
    ctas: int = 132


def hopper_blocks(head_dim: int) -> HopperBlocks:
    """The sizes for a head_dim. Shared memory (227 KB) bounds tile * stages; registers bound tile * head_dim."""
    if head_dim > 128:
        return HopperBlocks(tile=64, stages=2, consumers=1)
    return HopperBlocks(tile=128, stages=2 if head_dim == 128 else 3, consumers=2)


@dataclasses.dataclass(frozen=True)
class TritonBlocks:
    """Sizes of the Triton kernel.

    Attributes:
      queries: a window, at least MATRIX_ROWS. tokens: a tile. Both powers of two.
      warps: of a program.
      stages: of the software pipeline: tiles on their way, and the one in use.
    """

    queries: int
    tokens: int
    warps: int
    stages: int


MATRIX_ROWS = 16  # queries in the smallest tile of the matrix units


def triton_blocks(num_queries: int, head_dim: int, dtype) -> TritonBlocks:
    """The sizes for runs of up to num_queries queries of a KV head, computed in `dtype`.

    Registers bound queries * head_dim, and shared memory (99 KB on a card of compute capability 8.9 or 12.0) bounds
    tokens * head_dim * stages. Float32 has no matrix units: its tiles are small.
    """
    large = head_dim > 128
    if jnp.dtype(dtype) == jnp.float32:
        in_pieces = head_dim & (head_dim - 1) > 0  # with 4 warps it spills, on compute capability 8.9
        return TritonBlocks(queries=16, tokens=16 if head_dim > 64 else 32, warps=8 if in_pieces else 4, stages=2)
    if num_queries <= MATRIX_ROWS:
        return TritonBlocks(queries=16, tokens=32 if large else 64, warps=4, stages=3)
    if num_queries <= 64 or large:
        return TritonBlocks(queries=64, tokens=32 if large else 64, warps=8 if large else 4, stages=2)
    return TritonBlocks(queries=128, tokens=64, warps=8, stages=2)


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
    """Sizes of the TPU kernel.

    Attributes:
      heads: KV heads a grid step takes; a divisor of all.
      window: queries of a KV head a grid step takes; a multiple of 128.
      block_pages: pages fetched and attended to at once; a divisor of an item's.
      buffers: blocks in VMEM at once; all but one are on their way.
    """

    heads: int
    window: int
    block_pages: int
    buffers: int


TPU_VMEM = 10 << 20  # of the 16 MiB that every TPU gives a kernel unasked; the rest is the compiler's
TPU_IN_FLIGHT = 2 << 20  # about 1.6 TB/s times 1 us: fewer bytes on their way would leave the memory idle


def tpu_blocks(
    num_kv_heads: int,
    num_queries: int,
    num_tokens: int,
    item_pages: int,
    page_size: int,
    token_bytes: int,
    query_bytes: int,
    cores: int = 1,
) -> TpuBlocks:
    """The sizes for a call.

    As many heads share a grid step as fit, so that a page is one copy; with two cores at most half of them. The
    window then is all queries of a head in decode, and in prefill so many that a page is worth its copy: each
    window reads its items again, and 1024 queries make 1024 flop a byte in bf16.

    Args:
      num_queries: of a KV head, all rows together. num_tokens: T.
      item_pages: C.
      token_bytes: of a stored token of one head, keys and values.
      query_bytes: of a query in VMEM, with its output and state.
      cores: that share a grid.
    """
    block_tokens = 256 if num_tokens == 1 else 512
    block_pages = max(
        n for n in range(1, item_pages + 1) if item_pages % n == 0 and (n == 1 or n * page_size <= block_tokens)
    )
    largest = 2048 if num_tokens == 1 else 1024
    window = -(-min(num_queries, largest) // 128) * 128
    divisors = [
        n for n in range(num_kv_heads, 0, -1) if num_kv_heads % n == 0 and (n * cores <= num_kv_heads or n == 1)
    ]
    while True:
        for heads in divisors:
            block = heads * block_pages * page_size * token_bytes
            buffers = min(max(1 + -(-TPU_IN_FLIGHT // block), 2), 8)
            while buffers > 2 and buffers * block + heads * window * query_bytes > TPU_VMEM:
                buffers -= 1
            if buffers * block + heads * window * query_bytes <= TPU_VMEM:
                return TpuBlocks(heads, window, block_pages, buffers)
        window = -(-window // 256) * 128
