"""Device time of jitted loops, and what the device can do at best: measured copy bandwidth and matmul rate.

A *pass* is one launch of a compiled loop of many calls; passes are launched one after another without waiting, and the
host waits once at the end, so that what is timed is the device's.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

L2_BYTES = {  # of the cards' last cache, by a part of the device's name; TPUs have none that pages could stay in
    "H100": 50 << 20, "H200": 50 << 20, "A100": 40 << 20, "L40S": 96 << 20, "4090": 72 << 20, "B200": 126 << 20,
    "TPU": 16 << 20,
}  # fmt: skip
OTHER_L2_BYTES = 128 << 20
CPU_CACHE_BYTES = 16 << 20
ROTATIONS = 4  # pages rotate over so many times the L2 cache


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the repeats, the least and the most."""

    median: float
    least: float
    most: float
    calls: int  # of a repeat


def time_passes(run: Callable[[Any], Any], start: Any, calls: int, *, repeats: int, min_s: float) -> Timing:
    """Times `state = run(state)`, launched often enough that a repeat takes min_s.

    Args:
      run: enqueues a pass of `calls` calls and returns its result, a pytree of arrays, the next pass's state. May
        donate its argument.
      start: the first state.
    """
    state = jax.block_until_ready(run(start))  # compiles
    started = time.perf_counter()
    state = jax.block_until_ready(run(state))
    passes = max(1, round(min_s / max(time.perf_counter() - started, 1e-6)))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(passes):
            state = run(state)
        state = jax.block_until_ready(state)
        seconds.append((time.perf_counter() - started) / (passes * calls))
    return Timing(statistics.median(seconds), min(seconds), max(seconds), passes * calls)


def rotated_bytes(device) -> int:
    """Bytes to rotate over so that nothing is still cached when it is read again."""
    if device.platform == "cpu":
        return ROTATIONS * CPU_CACHE_BYTES
    known = [size for name, size in L2_BYTES.items() if name in device.device_kind]
    return ROTATIONS * (known[0] if known else OTHER_L2_BYTES)


def copy_bandwidth(num_bytes: int, *, repeats: int, min_s: float, calls: int = 8) -> float:
    """Bytes a second, read and written ones together, of a copy of num_bytes."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(x):
        return lax.fori_loop(0, calls, lambda _, x: lax.optimization_barrier(x + jnp.uint32(1)), x)

    x = jnp.zeros(num_bytes // 4, jnp.uint32)
    return 2 * x.nbytes / time_passes(run, x, calls, repeats=repeats, min_s=min_s).median


def matmul_rate(size: int, dtype, *, repeats: int, min_s: float, calls: int = 4) -> float:
    """Floating-point operations a second of square matrix products."""
    a, b = (jax.random.normal(key, (size, size), dtype) * size**-0.5 for key in jax.random.split(jax.random.key(0)))

    @jax.jit
    def run(x, b):
        return lax.fori_loop(0, calls, lambda _, x: (x @ b).astype(x.dtype), x)

    timing = time_passes(lambda x: run(x, b), a, calls, repeats=repeats, min_s=min_s)
    return 2 * size**3 / timing.median
