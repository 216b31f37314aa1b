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

import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # FlashInfer's copies share the device's memory

import cli
import jax
import kernel_flags
from absl import flags
from apr_kernels.backends import target_of
from decode_step import measure_step
from json_output import check_output_path, write_json
from kernel_baselines import absent, first_line
from kernel_cases import parse_case
from kernel_flags import (
    BUDGET_S,
    INTERPRET,
    case_names,
    chosen_backends,
    is_step,
    kernel_settings,
    query_dtype,
    step_model,
    target_runs,
    timing,
    wanted_baselines,
)
from kernel_flashinfer import flashinfer, start_compiling, why_absent
from kernel_measure import compare, measure_case
from kernel_report import markdown, plots
from kernel_runs import CaseRun, Settings
from kernel_timing import copy_bandwidth, matmul_rate

_OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write the last line into this file as well.")
_MARKDOWN = flags.DEFINE_string("markdown", None, "Write a Markdown table.")
_PLOTS = flags.DEFINE_string("plots", None, "Write plots into this directory (needs matplotlib).")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Write kernels.json, kernels.md and plots into this directory, after every case."
)

flags.adopt_module_key_flags(kernel_flags)

TIMED_ON_CPU = (
    "On a CPU only the reference is timed, and checked against itself in float32: these numbers say nothing of the "
    "kernels."
)
FIRST_SHARE = 0.7  # of the budget, for our kernels and JAX's; FlashInfer's follow
INTERPRETED = "Interpret mode: results were checked, nothing was timed."


def main() -> None:
    started = time.monotonic()
    if INTERPRET.value:  # the Hopper kernel's threads wait for each other: JAX's pool of one core would never end
        os.environ.setdefault("NPROC", str(max(4, os.cpu_count() or 1)))
    device = jax.devices()[0]
    target = target_of(device)
    names, _ = case_names(target.platform), target_runs(target.platform)
    outputs = _Outputs()
    backends = chosen_backends(target)
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


def _paths(path: str | None, folder: Path | None, name: str) -> list[Path]:
    """The path, and the name in the folder, where they are given."""
    wanted = ([] if path is None else [path]) + ([] if folder is None else [str(folder / name)])
    return [check_output_path(each) for each in wanted]


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
                print(f"no plots: {error} (pip install -e '.[plots]')", file=sys.stderr)
            else:
                print(f"plots: {', '.join(map(str, written)) or 'none, too few decode cases'}")


class _Benchmark:
    """Runs cases and keeps what was found."""

    def __init__(self, device, backends: tuple[str, ...], outputs: _Outputs, started: float):
        self._device, self._backends, self._outputs, self._started = device, backends, outputs, started
        self._platform = target_of(device).platform
        self._timed = not INTERPRET.value
        self._measured: dict[str, float] | None = None
        self._cases: list[dict[str, Any]] = []

    def run(self, backend: str, names: tuple[str, ...]) -> None:
        """Our kernel and JAX's on every case, then FlashInfer's, whose kernels are compiled meanwhile."""
        rates = self._rates() if self._timed else (float("inf"), float("inf"))
        settings = kernel_settings(backend, self._platform, rates)
        compiling = None
        wants_flashinfer = self._timed and "flashinfer" in wanted_baselines() and why_absent(self._platform) is None
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

    def _rates(self) -> tuple[float, float]:
        """Bytes and operations a second: the best of two sizes each, on a CPU of one."""
        on_cpu = self._platform == "cpu"
        dtype, options = query_dtype(on_cpu), timing(on_cpu)
        copy = max(copy_bandwidth(size << 20, **options) for size in ((128,) if on_cpu else (1024, 4096)))
        rate = max(matmul_rate(size, dtype, **options) for size in ((512,) if on_cpu else (4096, 8192)))
        self._measured = {"copy_gb_per_s": 1e-9 * copy, "matmul_tflops": 1e-12 * rate}
        print(f"copy {1e-9 * copy:,.1f} GB/s, matmul {1e-12 * rate:,.2f} TFLOP/s", flush=True)
        return copy, rate

    def _seconds_left(self, share: float = 1.0) -> float:
        """Of a share of the budget."""
        budget = float("inf") if BUDGET_S.value is None else share * BUDGET_S.value
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
        kind = "step" if is_step(name) else parse_case(name).kind
        failed = {"name": name, "kind": kind, "backend": settings.backend, "us": None}
        if self._seconds_left(share) < 0:
            return failed | {"skipped": f"--budget_s={BUDGET_S.value:g} are over"}
        try:
            if kind == "step":
                model, config, step_settings = step_model(settings)
                return {**failed, **measure_step(name, config, model, step_settings, timed=self._timed)}
            return {
                **failed,
                **measure_case(parse_case(name), settings, self._platform, wanted_baselines(), timed=self._timed),
            }
        except Exception as error:
            return failed | {"error": first_line(error)}
        finally:
            gc.collect()  # compiled loops hold stores in cycles

    def _flashinfer(self, found: dict[str, Any], settings: Settings) -> dict[str, Any]:
        if self._seconds_left() < 0:
            return absent(f"--budget_s={BUDGET_S.value:g} are over")
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


if __name__ == "__main__":
    cli.run(main)
