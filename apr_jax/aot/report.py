"""What is known of a compiled step, and of both together."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from apr_jax.aot.gpu_kernels import GpuKernel
from apr_jax.aot.hlo import Copy
from apr_jax.aot.target import AotTarget


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """One program on one device; bytes are a device's.

    Attributes:
      error: the first lines of why it does not compile.
      argument_bytes, aliased_bytes, output_bytes, temp_bytes, code_bytes: XLA's memory analysis; 0 if it failed.
      page_copies, weight_copies: as `hlo` defines them.
      read_bytes: what must be read: weights and keys and values, each once.
      read_ms: how long that takes at the bandwidth of the data sheet.
      kernels: of the Pallas kernels on a GPU; None on a TPU, whose compiler reports no registers.
    """

    name: str
    compiles: bool
    error: list[str]
    seconds: float
    argument_bytes: int = 0
    aliased_bytes: int = 0
    output_bytes: int = 0
    temp_bytes: int = 0
    code_bytes: int = 0
    cache_bytes: int
    page_copies: list[Copy] = dataclasses.field(default_factory=list)
    weight_copies: list[Copy] = dataclasses.field(default_factory=list)
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    read_bytes: int
    read_ms: float
    device_memory: int
    kernels: list[GpuKernel] | None = None

    @classmethod
    def failed(
        cls, name: str, seconds: float, error: list[str], *, cache_bytes: int, read_bytes: int, target: AotTarget
    ) -> "StepReport":
        """A step that the compiler refused."""
        return cls(
            name=name,
            compiles=False,
            error=error,
            seconds=seconds,
            cache_bytes=cache_bytes,
            read_bytes=read_bytes,
            read_ms=1e3 * read_bytes / target.device_bandwidth,
            device_memory=target.device_memory,
        )

    @property
    def cache_copied(self) -> bool | None:
        """Whether pages are written anew, or not aliased as a whole; None if it does not compile."""
        return bool(self.page_copies) or self.aliased_bytes < self.cache_bytes if self.compiles else None

    @property
    def weights_copied(self) -> bool | None:
        return bool(self.weight_copies) if self.compiles else None

    @property
    def used_bytes(self) -> int:
        """Arguments, temporaries, code, and what of the outputs lies on no argument."""
        return self.argument_bytes + self.temp_bytes + self.code_bytes + self.output_bytes - self.aliased_bytes

    @property
    def fits(self) -> bool | None:
        return self.used_bytes <= self.device_memory if self.compiles else None

    @property
    def spills(self) -> int | None:
        """Bytes that the Pallas kernels spill; None where no compiler says, or there is no kernel."""
        return sum(kernel.spill_bytes for kernel in self.kernels) if self.kernels else None

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        lists = {
            name: [dataclasses.asdict(x) for x in getattr(self, name)] for name in ("page_copies", "weight_copies")
        }
        kernels = None if self.kernels is None else [dataclasses.asdict(kernel) for kernel in self.kernels]
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in (*lists, "kernels")
        }
        derived = {name: getattr(self, name) for name in ("cache_copied", "weights_copied", "fits", "spills")}
        return plain | derived | lists | {"used_bytes": self.used_bytes, "kernels": kernels}


def summary(steps: Sequence[StepReport]) -> dict[str, Any]:
    """The keys that speak of all steps: the worst of each."""

    def any_of(values) -> bool | None:
        values = list(values)
        return True if True in values else None if None in values else False

    spills = [step.spills for step in steps]
    return {
        "compiles": all(step.compiles for step in steps),
        "aliased_bytes": min(step.aliased_bytes for step in steps),
        "cache_bytes": steps[0].cache_bytes,
        "temp_bytes": max(step.temp_bytes for step in steps),
        "cache_copied": any_of(step.cache_copied for step in steps),
        "weights_copied": any_of(step.weights_copied for step in steps),
        "spills": None if None in spills else sum(spill for spill in spills if spill is not None),
        "fits": None if None in [step.fits for step in steps] else all(step.fits for step in steps),
        "seconds": sum(step.seconds for step in steps),
    }
