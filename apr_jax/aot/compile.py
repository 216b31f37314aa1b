"""Compiles a workload's steps and asks what came out."""

import contextlib
import inspect
import logging
import re
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from apr_jax.aot.compiler import cuda_dir
from apr_jax.aot.gpu_kernels import find_kernels
from apr_jax.aot.hlo import Program
from apr_jax.aot.report import StepReport
from apr_jax.aot.target import AotTarget
from apr_jax.aot.workload import Step, Workload

logger = logging.getLogger(__name__)

_ERROR_LINES = 6
_TRITON_NAME = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton".*?name = \\?"([\w$]+)')


def compile_step(target: AotTarget, workload: Workload, step: Step, dump_dir: Path) -> StepReport:
    """Compiles a step for a target that is not there.

    Args:
      dump_dir: where `compiler.set_up` told the compiler to leave its texts.

    Returns:
      The report; where the compiler refused, one with the first lines of its error.
    """
    read_bytes = workload.read_bytes(step)
    earlier = set(dump_dir.rglob("*.ptx"))
    start = time.monotonic()
    try:
        with _as_if_on(target):
            lowered = step.function.trace(*step.args).lower(lowering_platforms=(target.platform,))
            compiled = lowered.compile()
    except Exception as error:  # tracing, Pallas, Mosaic and XLA each raise their own; all of it is the report
        logger.debug("%s", traceback.format_exc())
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        return StepReport.failed(
            step.name,
            time.monotonic() - start,
            [f"{type(error).__name__}: {lines[0]}", *lines[1:_ERROR_LINES]],
            cache_bytes=workload.cache_bytes,
            read_bytes=read_bytes,
            target=target,
        )
    seconds = time.monotonic() - start
    text = _latest_text(dump_dir, f"jit_{step.name}", "after_optimizations.txt")
    program = Program(text)
    memory = compiled.memory_analysis()
    kernels = None
    if target.platform == "cuda":
        names = set(_TRITON_NAME.findall(text))
        texts = sorted(set(dump_dir.rglob("*.ptx")) - earlier)
        thunks = _latest_text(dump_dir, f"jit_{step.name}", "thunk_sequence.txt")
        kernels = find_kernels(texts, names, cuda_dir() / "bin/ptxas", thunks)
    return StepReport(
        name=step.name,
        compiles=True,
        error=[],
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        cache_bytes=workload.cache_bytes,
        page_copies=program.copied_pages([leaf.shape for leaf in jax.tree.leaves(workload.pages) if leaf.ndim == 4]),
        weight_copies=program.copied_weights(),
        collectives=program.collectives(),
        read_bytes=read_bytes,
        read_ms=1e3 * read_bytes / target.device_bandwidth,
        device_memory=target.device_memory,
        kernels=kernels,
    )


def _as_if_on(target: AotTarget) -> contextlib.AbstractContextManager:
    """From JAX 0.11 on, Pallas-Triton asks the mesh for the card's kind where there is no device to ask."""
    fields = inspect.signature(jax.sharding.AbstractDevice).parameters
    if target.platform != "cuda" or "platform" not in fields:
        return contextlib.nullcontext()
    kind: dict[str, Any] = {"device_kind": target.kernels.kind, "platform": "gpu", "num_cores": target.num_cores}
    device = jax.sharding.AbstractDevice(**kind)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def _latest_text(dump_dir: Path, module: str, ending: str) -> str:
    """What the compiler left last of a module under names that end so."""
    found = [path for path in dump_dir.iterdir() if f".{module}." in path.name and path.name.endswith(ending)]
    assert found, f"the compiler left no {ending} of {module} in {dump_dir}"
    return max(found, key=lambda path: path.stat().st_mtime_ns).read_text()
