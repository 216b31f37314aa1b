"""Compiles the engine's prefill and decode steps for hardware that is not here; says what the compiler made of them.

Prints a table, and one JSON object as the last line. Exits with 1 if a step does not compile, with 2 on bad input.

Examples:
  python scripts/compile_aot.py --target=v5e:2x4 --model=qwen3_8b --tensor=8
  python scripts/compile_aot.py --target=h200 --model=qwen3_8b --threads=64 --context=4352
  python scripts/compile_aot.py --target=a100 --model=qwen3_0_6b --attention=reference --layers=2
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import cli
import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from apr_jax.aot.compile import compile_step
from apr_jax.aot.compiler import devices_of, set_up
from apr_jax.aot.report import StepReport, summary
from apr_jax.aot.target import TARGET_NAMES, find_target
from apr_jax.aot.workload import Contexts, make_workload, pool_pages
from apr_jax.config import EngineConfig, check
from apr_jax.models.presets import PRESETS

_DTYPES = ("bfloat16", "float32")
_KV_DTYPES = (*_DTYPES, "int8", "float8_e4m3fn")

_TARGET = flags.DEFINE_string("target", None, f"What to compile for: {', '.join(TARGET_NAMES)}, ...", required=True)
_MODEL = flags.DEFINE_enum("model", "qwen3_8b", sorted(PRESETS), "The model's shapes.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that the model is split over.")
_THREADS = flags.DEFINE_integer("threads", 64, "Threads of a decode step, all of one family.")
_CONTEXT = flags.DEFINE_integer("context", 4352, "Tokens that each thread sees.")
_OWN = flags.DEFINE_integer(
    "own", None, "Tokens of --context in each thread's own tail; the others are a prefix shared by all. "
    "By default 256, or half of a context shorter than 512.",
)  # fmt: skip
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", _DTYPES, "Of weights and activations.")
_KV_DTYPE = flags.DEFINE_enum("kv_dtype", None, _KV_DTYPES, "Of pages; by default --dtype.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Tokens a page.")
_NUM_PAGES = flags.DEFINE_integer(
    "num_pages", None, "Of the pool; by default what fills 80% of the memory together with the whole model's weights, "
    "or what the contexts can grow to, if that is more.",
)  # fmt: skip
_PREFILL_CHUNK = flags.DEFINE_integer("prefill_chunk", 256, "Tokens a row of a prefill step.")
_ATTENTION = flags.DEFINE_enum(
    "attention", "auto", ("auto", "reference", "pallas"), "auto, pallas: the target's kernels, or an error."
)
_LAYERS = flags.DEFINE_integer("layers", None, "Compile only so many layers; the bytes are those of so many.")
_DUMP_DIR = flags.DEFINE_string("dump_dir", None, "Keep the compiler's texts (HLO, PTX) in this directory.")


def main() -> None:
    target = find_target(_TARGET.value)
    model = PRESETS[_MODEL.value]
    if _LAYERS.value is not None:
        check(1 <= _LAYERS.value <= model.num_layers, f"--layers={_LAYERS.value}, must be in [1, {model.num_layers}]")
        model = dataclasses.replace(model, num_layers=_LAYERS.value)
    own = min(256, _CONTEXT.value // 2) if _OWN.value is None else _OWN.value
    contexts = Contexts(threads=_THREADS.value, context=_CONTEXT.value, own=own)
    check(_PAGE_SIZE.value >= 1, f"--page_size={_PAGE_SIZE.value}, must be >= 1")
    chosen: dict[str, Any] = {"dtype": _DTYPE.value, "kv_dtype": _KV_DTYPE.value, "attention": _ATTENTION.value}
    engine = EngineConfig(
        max_threads=contexts.threads,
        max_tail_pages=-(-512 // _PAGE_SIZE.value),
        prefill_chunk=_PREFILL_CHUNK.value,
        tensor=_TENSOR.value,
        **chosen,
    )
    num_pages = _NUM_PAGES.value
    if num_pages is None:
        fits = pool_pages(target, PRESETS[_MODEL.value], engine, _PAGE_SIZE.value)
        num_pages = max(fits, contexts.pages(_PAGE_SIZE.value, engine.max_tail_pages))
    with tempfile.TemporaryDirectory(prefix="compile_aot_") as temporary:
        dump_dir = Path(_DUMP_DIR.value or temporary).absolute()
        dump_dir.mkdir(parents=True, exist_ok=True)
        set_up(target, dump_dir)
        devices = devices_of(target, engine.tensor)
        workload = make_workload(target, devices, model, engine, contexts, _PAGE_SIZE.value, num_pages)
        steps = [compile_step(target, workload, step, dump_dir) for step in workload.steps]
    result = summary(steps) | {
        "target": target.name,
        "device": target.kernels.kind,
        "model": _MODEL.value,
        "num_layers": PRESETS[_MODEL.value].num_layers,
        "layers_compiled": model.num_layers,
        "tensor": engine.tensor,
        **dataclasses.asdict(contexts),
        "shared": contexts.shared,
        "dtype": engine.dtype,
        "kv_dtype": engine.kv_dtype or engine.dtype,
        "page_size": _PAGE_SIZE.value,
        "num_pages": workload.num_pages,
        "attention": workload.backend,
        "jax": jax.__version__,
        "steps": {step.name: step.as_object() for step in steps},
    }
    _show(Console(), result, steps)
    print(json.dumps(result))
    if not result["compiles"]:
        sys.exit(1)


def _show(console: Console, result: dict[str, Any], steps: list[StepReport]) -> None:
    layers, compiled = result["num_layers"], result["layers_compiled"]
    part = "" if layers == compiled else f", {compiled} of {layers} layers: all bytes are those of {compiled}"
    title = f"{result['model']} on {result['target']} ({result['device']}), tensor = {result['tensor']}{part}"
    table = Table(title=title, title_justify="left")
    table.add_column("a device's")
    for step in steps:
        table.add_column(step.name, justify="right")
    for name, cell in _ROWS.items():
        table.add_row(name, *(cell(step) if step.compiles or name in _KNOWN_BEFORE else "-" for step in steps))
    console.print(table)
    console.print(
        f"attention: {result['attention']}; {result['threads']} threads of {result['context']} tokens: "
        f"{result['shared']} shared by all, {result['own']} of their own; {result['num_pages']} pages of "
        f"{result['page_size']} tokens, {result['kv_dtype']}",
        highlight=False,
        soft_wrap=True,
    )
    for step in steps:
        for line in step.error:
            console.print(f"{step.name}: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        for copy in _largest([*step.page_copies, *step.weight_copies]):
            console.print(f"{step.name} copies {copy}", markup=False, highlight=False, soft_wrap=True)
        for kernel in step.kernels or ():
            counts = ", ".join(f"{count} {kind}" for kind, count in kernel.instructions.items()) or "none of note"
            shared = "not reported" if kernel.shared_bytes is None else f"{kernel.shared_bytes:,} bytes"
            console.print(
                f"{step.name} kernel {kernel.name}: {kernel.registers} registers, {kernel.spill_bytes} bytes spilled, "
                f"shared memory {shared}; instructions: {counts}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip


def _largest(copies, shown: int = 5) -> list[str]:
    lines = [
        f"{copy.of}: {copy.bytes:,} bytes, {'at every step' if copy.in_loop else 'once'}"
        f"{', to on-chip memory' if copy.on_chip else ''} ({copy.instruction})"
        for copy in sorted(copies, key=lambda copy: -copy.bytes)
    ]
    return lines[:shown] + ([f"{len(lines) - shown} more"] if len(lines) > shown else [])


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


_KNOWN_BEFORE = ("compiles", "seconds", "cache bytes", "bytes to read", "... at the data sheet's bandwidth")
_ROWS = {
    "compiles": lambda step: _yes(step.compiles),
    "seconds": lambda step: f"{step.seconds:.1f}",
    "argument bytes": lambda step: f"{step.argument_bytes:,}",
    "cache bytes": lambda step: f"{step.cache_bytes:,}",
    "aliased bytes": lambda step: f"{step.aliased_bytes:,}",
    "temporary bytes": lambda step: f"{step.temp_bytes:,}",
    "... of the cache": lambda step: f"{step.temp_bytes / step.cache_bytes:.1%}",
    "cache copied": lambda step: _yes(step.cache_copied),
    "weights copied": lambda step: _yes(step.weights_copied),
    "fits the memory": lambda step: f"{_yes(step.fits)} ({step.used_bytes / step.device_memory:.0%})",
    "collectives": lambda step: ", ".join(f"{n} {kind}" for kind, n in step.collectives.items()) or "none",
    "bytes to read": lambda step: f"{step.read_bytes:,}",
    "... at the data sheet's bandwidth": lambda step: f"{step.read_ms:.2f} ms",
    "spilled bytes": lambda step: "not reported" if step.spills is None else f"{step.spills:,}",
}


if __name__ == "__main__":
    cli.run(main)
