"""What each backend of paged attention supports, and the block sizes it runs with."""

import jax.numpy as jnp

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
    if name == "float8_e4m3fn" and target.platform == "cuda" and target.compute_capability < (8, 9):
        return "float8_e4m3fn needs compute capability 8.9"
    return None
