"""The flags of `benchmark_kernels.py`, and the settings of kernels and cases that they stand for."""

import dataclasses
import importlib.util
import re
from typing import Any

import jax
from absl import flags
from apr_kernels.backends import BACKENDS, REFERENCE, Target, choose_backend, unsupported
from decode_step import FORM
from kernel_cases import SUITES, parse_case
from kernel_report import BASELINES
from kernel_runs import ERROR_BOUND, Settings
from kernel_timing import rotated_bytes

from apr_jax.config import ModelConfig, check
from apr_jax.models.presets import PRESETS
from apr_jax.testing import tiny_config

DTYPES = tuple(ERROR_BOUND)
KV_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")

_SUITE = flags.DEFINE_enum("suite", None, sorted(SUITES), "Cases to run. By default cpu on a CPU, otherwise h200.")
_CASES = flags.DEFINE_list("cases", None, "Names of cases, instead of a suite.")
_BACKEND = flags.DEFINE_enum("backend", None, BACKENDS, "Instead of the platform's.")
INTERPRET = flags.DEFINE_bool("interpret", False, "Check every Pallas backend in interpret mode; times nothing.")
_BASELINES = flags.DEFINE_list(
    "baselines", None, f"What to compare with, of {', '.join(BASELINES)}. By default all, in interpret mode none."
)
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Of queries. By default bfloat16; on a CPU float32.")
_KV_DTYPE = flags.DEFINE_enum("kv_dtype", None, KV_DTYPES, "Of pages. By default that of queries.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Tokens a page.", lower_bound=1)
_KV_HEADS = flags.DEFINE_integer("kv_heads", None, "KV heads. By default 8, in interpret mode 2.", lower_bound=1)
_GROUP = flags.DEFINE_integer(
    "group_size", None, "Query heads a KV head. By default 4, in interpret mode 2.", lower_bound=1
)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "Of a head.", lower_bound=1)
_ITEM_PAGES = flags.DEFINE_integer("item_pages", 16, "Pages an item of the plan.", lower_bound=1)
_TARGET_RUNS = flags.DEFINE_list(
    "target_runs", None, "Runs that plans are cut into; each is tried. By default 33,132 on a GPU, else 1."
)
_MAX_PARTIALS = flags.DEFINE_integer("max_partials", 64, "Partial results a row, at most.", lower_bound=1)
_MIN_SHARED = flags.DEFINE_integer("min_shared_tokens", 200, "Shorter shared runs are read privately.", lower_bound=1)
_MODEL = flags.DEFINE_enum(
    "model", None, ["tiny", *PRESETS], "Of step cases; its weights are random. By default qwen3_8b, interpreted tiny."
)
_REPEATS = flags.DEFINE_integer("repeats", None, "Of each timing. By default 5, on a CPU 3.", lower_bound=1)
_MIN_MS = flags.DEFINE_float("min_ms", 30.0, "Device time of each repeat.", lower_bound=0.0)
BUDGET_S = flags.DEFINE_float("budget_s", None, "After so many seconds no further case is begun.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of data and page ids.")


def case_names(device_platform: str) -> tuple[str, ...]:
    """The cases' names, each checked."""
    check(_CASES.value is None or _SUITE.value is None, "--cases and --suite exclude each other")
    default = "tiny" if INTERPRET.value else "cpu" if device_platform == "cpu" else "h200"
    names = tuple(dict.fromkeys(_CASES.value or SUITES[_SUITE.value or default]))
    for name in names:
        if not is_step(name):
            parse_case(name)
    unknown = set(wanted_baselines()) - set(BASELINES)
    check(not unknown, f"--baselines has {', '.join(sorted(unknown))}, must be of {', '.join(BASELINES)}")
    return names


def wanted_baselines() -> tuple[str, ...]:
    """The baselines asked for."""
    default = () if INTERPRET.value else tuple(BASELINES)
    return default if _BASELINES.value is None else tuple(_BASELINES.value)


def is_step(name: str) -> bool:
    """Whether a case is a whole decode step."""
    return re.fullmatch(FORM, name) is not None


def chosen_backends(target: Target) -> tuple[str, ...]:
    """The one that is measured; in interpret mode all Pallas backends that exist.

    Raises:
      ValueError: there is no such module, or it cannot run on the target.
    """
    asked = _BACKEND.value
    if INTERPRET.value:
        check(target.platform == "cpu", "--interpret is for CPUs: set JAX_PLATFORMS=cpu")
        found = [name for name in BACKENDS if name != REFERENCE and _exists(name)]
        check(bool(found) if asked is None else asked in found, f"no Pallas backend {asked or ''} to interpret")
        return tuple(found) if asked is None else (asked,)
    if asked == REFERENCE or target.platform == "cpu":
        check(asked in (None, REFERENCE), f"--backend={asked} does not run on a CPU: add --interpret")
        return (REFERENCE,)
    backend = asked or choose_backend(target, _kv_dtype(False), _PAGE_SIZE.value, _HEAD_DIM.value)
    reason = unsupported(backend, target, _kv_dtype(False), _PAGE_SIZE.value, _HEAD_DIM.value)
    check(reason is None, f"--backend={backend}: {reason}")
    check(_exists(backend), f"backend {backend} is not there")
    return (backend,)


def _exists(backend: str) -> bool:
    return all(
        importlib.util.find_spec(f"apr_kernels.{kernel}.{backend}") for kernel in ("paged_attention", "kv_update")
    )


def query_dtype(on_cpu: bool) -> str:
    """Of queries."""
    return _DTYPE.value or ("float32" if on_cpu else "bfloat16")


def _kv_dtype(on_cpu: bool) -> str:
    return _KV_DTYPE.value or query_dtype(on_cpu)


def target_runs(device_platform: str) -> tuple[int, ...]:
    """Runs that plans are cut into. Raises ValueError: not numbers above 0."""
    asked = _TARGET_RUNS.value or (["33", "132"] if device_platform == "cuda" else ["1"])
    check(all(each.isdecimal() and int(each) > 0 for each in asked), f"--target_runs has {asked}, must be numbers >= 1")
    return tuple(int(each) for each in asked)


def timing(on_cpu: bool) -> dict[str, Any]:
    """How often and how long something is timed."""
    return {"repeats": _REPEATS.value or (3 if on_cpu else 5), "min_s": 1e-3 * _MIN_MS.value}


def kernel_settings(backend: str, platform: str, rates: tuple[float, float]) -> Settings:
    """What the flags say of a backend; rates: bytes and operations a second, as measured."""
    on_cpu, interpret = platform == "cpu", INTERPRET.value
    on_cpu = on_cpu and not interpret  # interpreted kernels take what they take on their hardware
    dtype, kv_dtype = query_dtype(on_cpu), _kv_dtype(on_cpu)
    num_kv_heads = _KV_HEADS.value or (2 if interpret else 8)
    return Settings(
        page_size=_PAGE_SIZE.value,
        num_heads=num_kv_heads * (_GROUP.value or (2 if interpret else 4)),
        num_kv_heads=num_kv_heads,
        head_dim=_HEAD_DIM.value,
        dtype=dtype,
        kv_dtype=kv_dtype,
        item_pages=_ITEM_PAGES.value,
        max_partials=_MAX_PARTIALS.value,
        min_shared_tokens=16 if interpret else _MIN_SHARED.value,  # or the small contexts share nothing
        target_runs=target_runs(platform),
        **timing(on_cpu),
        seed=_SEED.value,
        backend=backend,
        interpret=interpret,
        rotate_bytes=1 if interpret else rotated_bytes(jax.devices()[0]),
        copy_bytes_per_s=rates[0],
        flops_per_s=rates[1],
    )


def step_model(settings: Settings) -> tuple[str, ModelConfig, Settings]:
    """The model of step cases: name, sizes, and the settings with its heads."""
    tiny = tiny_config(head_dim=_HEAD_DIM.value, d_model=64)
    model = _MODEL.value or ("tiny" if INTERPRET.value else "qwen3_8b")
    config = tiny if model == "tiny" else PRESETS[model]
    sizes = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    return model, config, dataclasses.replace(settings, **sizes)
