"""What ptxas and XLA say of the Pallas kernels in a dump: registers, spills, shared memory, and what they are made of.

XLA compiles its own kernels (products, fusions) into the same dump; they are not looked at.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

# What to look for in PTX -> how it is called in the report.
_INSTRUCTIONS = {
    "wgmma.mma_async": r"\bwgmma\.mma_async\b",
    "mma.sync": r"\bmma\.sync\b",
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "cp.async": r"\bcp\.async\.(?:ca|cg)\b",
    "cp.async.bulk": r"\bcp\.async\.bulk\b(?!\.tensor|\.commit|\.wait)",
    "cp.async.bulk.tensor": r"\bcp\.async\.bulk\.tensor\b",
    "ldmatrix": r"\bldmatrix\b",
}
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_RESOURCES = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_LAUNCH = re.compile(r"\] ([\w$]+) grid: .* shared_memory: (\d+) bytes")
_MOSAIC_LAUNCH = re.compile(r"@mosaic_gpu_get_function\(ptr [^,]+, ptr [^,]+, i32 (\d+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """A compiled kernel.

    Attributes:
      registers: a thread. spill_bytes: stores and loads of spilled registers, a thread.
      shared_bytes: a block; what the kernel declares and what its launch adds. None: no launch was found.
      instructions: how many of each kind of matrix and asynchronous-copy instruction its PTX holds.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int | None
    instructions: dict[str, int]


def find_kernels(paths: Iterable[Path], kernel_names: Iterable[str], ptxas: Path, thunks: str) -> list[GpuKernel]:
    """The Pallas kernels among PTX files, each once however many layers run it.

    Args:
      kernel_names: of Triton kernels; those of Mosaic GPU lie in files of their own and are all taken.
      ptxas: the assembler.
      thunks: XLA's list of what the program launches, which says how much shared memory a launch adds; for a Mosaic
        GPU kernel the host code beside its PTX, `.ll`, does.

    Raises:
      RuntimeError: ptxas refuses a kernel.
    """
    names = set(kernel_names)
    launched = {name: int(size) for name, size in _LAUNCH.findall(thunks)}
    found: dict[str, GpuKernel] = {}
    for path in paths:
        text = path.read_text(errors="replace")
        entry = _ENTRY.search(text)
        if entry is None:
            continue
        name, is_mosaic = entry[1], not path.name.startswith("module_")
        body = re.sub(r"//.*", "", text).replace(name, "kernel")
        if body not in found and (is_mosaic or name in names or re.sub(r"_\d+$", "", name) in names):
            kernel = _assemble(name, text, ptxas)
            added = _mosaic_launch(path.with_suffix(".ll")) if is_mosaic else launched.get(name)
            declared = kernel.shared_bytes or 0
            found[body] = dataclasses.replace(kernel, shared_bytes=None if added is None else declared + added)
    return list(found.values())


def _mosaic_launch(host: Path) -> int | None:
    """Bytes of shared memory that the host code of a Mosaic GPU kernel asks for; None: it does not say."""
    found = _MOSAIC_LAUNCH.search(host.read_text(errors="replace")) if host.exists() else None
    return int(found[1]) if found else None


def parse_ptxas(name: str, report: str, ptx: str) -> GpuKernel:
    """A kernel from what `ptxas -v` printed of it.

    Raises:
      RuntimeError: the report says nothing of registers.
    """
    used = _RESOURCES.search(report)
    if used is None:
        raise RuntimeError(f"ptxas says nothing of {name}: {report[:500]}")
    spills = [int(stores) + int(loads) for _, stores, loads in _SPILLS.findall(report)]
    code = re.sub(r"//.*", "", ptx)
    counts = {kind: len(re.findall(pattern, code)) for kind, pattern in _INSTRUCTIONS.items()}
    return GpuKernel(
        name=name,
        registers=int(used[1]),
        spill_bytes=sum(spills),
        shared_bytes=int(used[2] or 0),
        instructions={kind: count for kind, count in counts.items() if count},
    )


def _assemble(name: str, text: str, ptxas: Path) -> GpuKernel:
    target = re.search(r"^\.target\s+(\w+)", text, re.MULTILINE)
    architecture = target[1] if target else "sm_80"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        command = [str(ptxas), "-v", f"-arch={architecture}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"ptxas refuses {name}: {done.stderr.strip()[:500]}")
    return parse_ptxas(name, done.stderr + done.stdout, text)
