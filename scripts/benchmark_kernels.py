"""Attention kernels case by case: unique bytes a second against the measured copy bandwidth, and against baselines.

*Unique bytes* are the keys and values of every visible token, counted once however many rows read them; the roofline
of a case is max(unique bytes / measured copy bandwidth, flops / measured matmul rate). Baselines of the same run: our
kernel with nothing shared, JAX's public paged attention, FlashInfer where installed. Every result is checked against
the float32 reference on the same data before anything is timed. On a CPU the reference alone is timed.

Calls rotate over the stores of several layers, at least four times the L2 cache of pages, in one compiled loop;
medians of repeats, compiling and warming up apart. The last line is one JSON object.

Cases: decode_readersN_prefixN_tailN, treeN_readersN_rootN_tailN (depth; readers n ** depth),
joinedN_tokensN_readersN_tailN (segments of some tokens; 8 rows a context), prefill_chunkN_contextN,
unrelated_rowsN_contextN, and step_threadsN_prefixN, a whole decode step of --model with random weights.

Examples:
  python scripts/benchmark_kernels.py
  python scripts/benchmark_kernels.py --suite=h200 --output_dir=out
  python scripts/benchmark_kernels.py --suite=h200 --budget_s=420
  python scripts/benchmark_kernels.py --cases=decode_readers64_prefix4096_tail16,unrelated_rows256_context4096
  python scripts/benchmark_kernels.py --interpret --output_dir=out
"""

import dataclasses
import gc
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # FlashInfer's copies share the device's memory

import cli
import jax
from absl import flags
from apr_kernels.backends import BACKENDS, REFERENCE, Target, choose_backend, target_of, unsupported
from decode_step import FORM, measure_step
from json_output import check_output_path, write_json
from kernel_baselines import absent, first_line
from kernel_cases import SUITES, parse_case
from kernel_flashinfer import flashinfer, start_compiling, why_absent
from kernel_measure import compare, measure_case
from kernel_report import BASELINES, markdown, plots
from kernel_runs import ERROR_BOUND, CaseRun, Settings
from kernel_timing import copy_bandwidth, matmul_rate, rotated_bytes

from apr_jax.config import check
from apr_jax.models.presets import PRESETS
from apr_jax.testing import tiny_config

DTYPES = tuple(ERROR_BOUND)
KV_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")

_SUITE = flags.DEFINE_enum("suite", None, sorted(SUITES), "Cases to run. By default cpu on a CPU, otherwise h200.")
_CASES = flags.DEFINE_list("cases", None, "Names of cases, instead of a suite.")
_BACKEND = flags.DEFINE_enum("backend", None, BACKENDS, "Instead of the platform's.")
_INTERPRET = flags.DEFINE_bool("interpret", False, "Check every Pallas backend in interpret mode; times nothing.")
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
_BUDGET_S = flags.DEFINE_float("budget_s", None, "After so many seconds no further case is begun.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of data and page ids.")
_OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write the last line into this file as well.")
_MARKDOWN = flags.DEFINE_string("markdown", None, "Write a Markdown table, such as docs/results/kernels_h200.md.")
_PLOTS = flags.DEFINE_string("plots", None, "Write plots into this directory (needs matplotlib).")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Write kernels.json, kernels.md and plots into this directory, after every case."
)

TIMED_ON_CPU = (
    "On a CPU only the reference is timed, and checked against itself in float32: these numbers say nothing of the "
    "kernels."
)
FIRST_SHARE = 0.7  # of the budget, for our kernels and JAX's; FlashInfer's follow
INTERPRETED = "Interpret mode: results were checked, nothing was timed."


def main() -> None:
    started = time.monotonic()
    if _INTERPRET.value:  # the Hopper kernel's threads wait for each other: JAX's pool of one core would never end
        os.environ.setdefault("NPROC", str(max(4, os.cpu_count() or 1)))
    device = jax.devices()[0]
    target = target_of(device)
    names, _ = _names(target.platform), _target_runs(target.platform)
    outputs = _Outputs()
    backends = _backends(target)
    benchmark = _Benchmark(device, backends, outputs, started)
    with cli.profile():
        for backend in backends:
            benchmark.run(backend, names)
    summary = benchmark.summary()
    outputs.write(summary, last=True)
    print(json.dumps(summary))
    failed = [case["name"] for case in summary["cases"] if case.get("error") or case.get("correct") is False]
    if failed:
        print(f"error: {len(failed)} cases failed or were wrong: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def _names(device_platform: str) -> tuple[str, ...]:
    """The cases' names, each checked."""
    check(_CASES.value is None or _SUITE.value is None, "--cases and --suite exclude each other")
    default = "tiny" if _INTERPRET.value else "cpu" if device_platform == "cpu" else "h200"
    names = tuple(dict.fromkeys(_CASES.value or SUITES[_SUITE.value or default]))
    for name in names:
        if not _is_step(name):
            parse_case(name)
    unknown = set(_wanted()) - set(BASELINES)
    check(not unknown, f"--baselines has {', '.join(sorted(unknown))}, must be of {', '.join(BASELINES)}")
    return names


def _wanted() -> tuple[str, ...]:
    """The baselines asked for."""
    default = () if _INTERPRET.value else tuple(BASELINES)
    return default if _BASELINES.value is None else tuple(_BASELINES.value)


def _is_step(name: str) -> bool:
    return re.fullmatch(FORM, name) is not None


def _backends(target: Target) -> tuple[str, ...]:
    """The one that is measured; in interpret mode all Pallas backends that exist.

    Raises:
      ValueError: there is no such module, or it cannot run on the target.
    """
    asked = _BACKEND.value
    if _INTERPRET.value:
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


def _dtype(on_cpu: bool) -> str:
    return _DTYPE.value or ("float32" if on_cpu else "bfloat16")


def _kv_dtype(on_cpu: bool) -> str:
    return _KV_DTYPE.value or _dtype(on_cpu)


def _paths(path: str | None, folder: Path | None, name: str) -> list[Path]:
    """The path, and the name in the folder, where they are given."""
    wanted = ([] if path is None else [path]) + ([] if folder is None else [str(folder / name)])
    return [check_output_path(each) for each in wanted]


def _target_runs(device_platform: str) -> tuple[int, ...]:
    asked = _TARGET_RUNS.value or (["33", "132"] if device_platform == "cuda" else ["1"])
    check(all(each.isdecimal() and int(each) > 0 for each in asked), f"--target_runs has {asked}, must be numbers >= 1")
    return tuple(int(each) for each in asked)


def _repeats(on_cpu: bool) -> int:
    return _REPEATS.value or (3 if on_cpu else 5)


class _Outputs:
    """Files that the flags name, each checked before any work is done."""

    def __init__(self):
        folder = None if _OUTPUT_DIR.value is None else Path(_OUTPUT_DIR.value).expanduser()
        self.plots = folder if _PLOTS.value is None else Path(_PLOTS.value).expanduser()
        for each in (folder, self.plots):
            if each is not None:
                each.mkdir(parents=True, exist_ok=True)
        self.json = _paths(_OUTPUT_JSON.value, folder, "kernels.json")
        self.markdown = _paths(_MARKDOWN.value, folder, "kernels.md")

    def write(self, summary: dict[str, Any], last: bool = False) -> None:
        for path in self.json:
            write_json(path, summary)
        for path in self.markdown:
            path.write_text(markdown(summary), encoding="utf-8")
        if last and self.plots is not None:
            try:
                written = plots(summary, self.plots)
            except ImportError as error:
                print(f"no plots: {error} (pip install 'apr-jax[plots]')", file=sys.stderr)
            else:
                print(f"plots: {', '.join(map(str, written)) or 'none, too few decode cases'}")


class _Benchmark:
    """Runs cases and keeps what was found."""

    def __init__(self, device, backends: tuple[str, ...], outputs: _Outputs, started: float):
        self._device, self._backends, self._outputs, self._started = device, backends, outputs, started
        self._platform = target_of(device).platform
        self._timed = not _INTERPRET.value
        self._measured: dict[str, float] | None = None
        self._cases: list[dict[str, Any]] = []

    def run(self, backend: str, names: tuple[str, ...]) -> None:
        """Our kernel and JAX's on every case, then FlashInfer's, whose kernels are compiled meanwhile."""
        settings = self._settings(backend)
        compiling = None
        wants_flashinfer = self._timed and "flashinfer" in _wanted() and why_absent(self._platform) is None
        if wants_flashinfer:
            sizes = (settings.num_heads, settings.num_kv_heads, settings.head_dim)
            compiling = start_compiling(*sizes, settings.dtype)
        for name in names:
            self._cases.append(self._guarded(name, settings, FIRST_SHARE if wants_flashinfer else 1.0))
            self._tell(self._cases[-1])
            self._outputs.write(self.summary())
        if not wants_flashinfer:
            return
        if compiling is not None:
            self._wait_for(compiling)
        for case in self._cases:
            if case["kind"] != "step" and case.get("us") is not None:
                case["baselines"]["flashinfer"] = self._flashinfer(case, settings)
                compare(case)
                self._tell(case)
                self._outputs.write(self.summary())

    def summary(self) -> dict[str, Any]:
        note = INTERPRETED if not self._timed else TIMED_ON_CPU if self._platform == "cpu" else ""
        return {
            "cases": self._cases,
            "device": {"kind": self._device.device_kind, "backend": ", ".join(self._backends)},
            "measured": self._measured,
            "note": note,
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
        }

    def _settings(self, backend: str) -> Settings:
        on_cpu, interpret = self._platform == "cpu", not self._timed
        on_cpu = on_cpu and not interpret  # interpreted kernels take what they take on their hardware
        dtype, kv_dtype = _dtype(on_cpu), _kv_dtype(on_cpu)
        num_kv_heads = _KV_HEADS.value or (2 if interpret else 8)
        rates = (float("inf"), float("inf")) if interpret else self._rates(dtype)
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
            target_runs=_target_runs(self._platform),
            repeats=_repeats(on_cpu),
            min_s=1e-3 * _MIN_MS.value,
            seed=_SEED.value,
            backend=backend,
            interpret=interpret,
            rotate_bytes=1 if interpret else rotated_bytes(self._device),
            copy_bytes_per_s=rates[0],
            flops_per_s=rates[1],
        )

    def _rates(self, dtype: str) -> tuple[float, float]:
        """Bytes and operations a second: the best of two sizes each, on a CPU of one."""
        on_cpu = self._platform == "cpu"
        options = {"repeats": _repeats(on_cpu), "min_s": 1e-3 * _MIN_MS.value}
        copy = max(copy_bandwidth(size << 20, **options) for size in ((128,) if on_cpu else (1024, 4096)))
        rate = max(matmul_rate(size, dtype, **options) for size in ((512,) if on_cpu else (4096, 8192)))
        self._measured = {"copy_gb_per_s": 1e-9 * copy, "matmul_tflops": 1e-12 * rate}
        print(f"copy {1e-9 * copy:,.1f} GB/s, matmul {1e-12 * rate:,.2f} TFLOP/s", flush=True)
        return copy, rate

    def _seconds_left(self, share: float = 1.0) -> float:
        """Of a share of the budget."""
        budget = float("inf") if _BUDGET_S.value is None else share * _BUDGET_S.value
        return budget - (time.monotonic() - self._started)

    def _wait_for(self, compiling: subprocess.Popen) -> None:
        """Until FlashInfer's kernels are compiled or the budget is over; what is missing then fails with its reason."""
        left = self._seconds_left()
        try:
            compiling.wait(None if left == float("inf") else max(0.0, left))
        except subprocess.TimeoutExpired:
            compiling.terminate()

    def _guarded(self, name: str, settings: Settings, share: float) -> dict[str, Any]:
        """A case's result; an error of a compiler or a kernel is one, so that the other cases are still run."""
        kind = "step" if _is_step(name) else parse_case(name).kind
        failed = {"name": name, "kind": kind, "backend": settings.backend, "us": None}
        if self._seconds_left(share) < 0:
            return failed | {"skipped": f"--budget_s={_BUDGET_S.value:g} are over"}
        try:
            if kind == "step":
                return {**failed, **_step(name, settings, self._timed)}
            return {**failed, **measure_case(parse_case(name), settings, self._platform, _wanted(), timed=self._timed)}
        except Exception as error:
            return failed | {"error": first_line(error)}
        finally:
            gc.collect()  # compiled loops hold stores in cycles

    def _flashinfer(self, found: dict[str, Any], settings: Settings) -> dict[str, Any]:
        if self._seconds_left() < 0:
            return absent(f"--budget_s={_BUDGET_S.value:g} are over")
        try:
            run = CaseRun(parse_case(found["name"]), settings)
            return flashinfer(run, self._platform, run.reference())
        except Exception as error:
            return absent(first_line(error))
        finally:
            gc.collect()

    def _tell(self, case: dict[str, Any]) -> None:
        """One line on a case."""
        words = [f"{case['name']} ({case['backend']}):"]
        if case.get("error") or case.get("skipped"):
            words.append(case.get("error") or f"skipped, {case['skipped']}")
        if case.get("us") is not None:
            words.append(
                f"{case['us']:,.1f} us, {case['gb_per_s']:,.1f} GB/s, {case['roofline_fraction']:.0%} of roofline"
            )
        elif case.get("weight_bytes"):
            words.append("every row sampled at every step")
        if case.get("max_error") is not None:
            words.append(f"error {case['max_error']:.1e}{'' if case['correct'] else ' WRONG'}")
        for name, baseline in case.get("baselines", {}).items():
            if baseline["us"] is not None:
                words.append(f"{name} {baseline['us']:,.1f} us")
        if case.get("parts_us"):
            words.append(", ".join(f"{name} {us:,.0f} us" for name, us in case["parts_us"].items()))
        print(" ".join([words[0], "; ".join(words[1:])]), flush=True)


def _step(name: str, settings: Settings, timed: bool) -> dict[str, Any]:
    tiny = tiny_config(head_dim=_HEAD_DIM.value, d_model=64)
    model = _MODEL.value or ("qwen3_8b" if timed else "tiny")
    config = tiny if model == "tiny" else PRESETS[model]
    sizes = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    return measure_step(name, config, model, dataclasses.replace(settings, **sizes), timed=timed)


if __name__ == "__main__":
    cli.run(main)
