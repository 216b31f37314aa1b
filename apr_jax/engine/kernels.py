"""Chooses an engine's kernels, once, by platform and configuration."""

import dataclasses
import logging

import jax
from apr_kernels.backends import REFERENCE, choose_backend, target_of

from apr_jax.config import CacheConfig, EngineConfig, ModelConfig, check
from apr_jax.engine.attend import Kernels
from apr_jax.models.sharding import check_divisible, make_mesh

logger = logging.getLogger(__name__)


def fill_chip(model_config: ModelConfig, engine_config: EngineConfig) -> EngineConfig:
    """The configuration with `target_runs` set: on a GPU, as many as its multiprocessors over a device's KV heads, as
    each pair is a block of its own; 1 on TPUs, whose cores work through items in turn, and on CPUs.
    """
    if engine_config.target_runs is not None:
        return engine_config
    device = jax.devices()[0]
    on_gpu = target_of(device).platform == "cuda"
    num_cores = getattr(device, "core_count", None) or 132
    num_heads = max(1, model_config.num_kv_heads // engine_config.tensor)
    return dataclasses.replace(engine_config, target_runs=-(-num_cores // num_heads) if on_gpu else 1)


def choose_kernels(model_config: ModelConfig, cache_config: CacheConfig, engine_config: EngineConfig) -> Kernels:
    """The kernels for the devices at hand; says in the log which, and why.

    Raises:
      ValueError: `attention` is "pallas" and no Pallas kernel serves this device, dtype, page size and head_dim; or the
        model cannot be split over `tensor` devices, or there are fewer.
    """
    target = target_of(jax.devices()[0])
    dtype = engine_config.kv_dtype or engine_config.dtype
    backend, why = REFERENCE, "as configured"
    if engine_config.attention == "pallas" or (engine_config.attention == "auto" and target.platform != "cpu"):
        try:
            backend, why = choose_backend(target, dtype, cache_config.page_size, model_config.head_dim), "by platform"
        except ValueError as error:
            check(engine_config.attention == "auto", f"attention=pallas: {error}")
            logger.warning("%s", error)
            why = "no Pallas kernel fits"
    elif engine_config.attention == "auto":
        why = "by platform"
    if engine_config.tensor > 1:
        check_divisible(model_config, engine_config.tensor)
    logger.info(
        "attention: %s (%s) on %s, %s pages, %d device(s)", backend, why, target.kind, dtype, engine_config.tensor
    )
    return Kernels(backend, make_mesh(engine_config.tensor))
