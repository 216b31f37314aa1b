"""Everything measured of one case: our kernel, its bounds, and the baselines that run beside it."""

from collections.abc import Sequence
from typing import Any

from kernel_baselines import absent, jax_public
from kernel_cases import KernelCase
from kernel_flashinfer import why_absent
from kernel_report import BASELINES
from kernel_runs import NO_SHARING, CaseRun, Settings


def measure_case(
    case: KernelCase, settings: Settings, device_platform: str, baselines: Sequence[str], *, timed: bool
) -> dict[str, Any]:
    """Our kernel and JAX's on a case; FlashInfer's numbers are put in later.

    Args:
      baselines: names of BASELINES to measure.
      timed: False only checks.
    """
    run = CaseRun(case, settings)
    expected = run.reference()
    unique_bytes, flops, roofline_s = settings.bounds(case)
    found: dict[str, Any] = {
        "parameters": case.parameters,
        "unique_bytes": unique_bytes,
        "flops": flops,
        **run.measure(settings.min_shared_tokens, expected, timed=timed),
        "baselines": {name: absent("left out by --baselines") for name in BASELINES},
    }
    if "private" in baselines:
        found["baselines"]["private"] = _private(run, expected, timed, found["target_runs"])
    if "jax" in baselines:
        pallas = {"tpu": "tpu", "gpu_hopper": "cuda", "gpu_triton": "cuda"}
        kernels_of = device_platform if timed else pallas[settings.backend]
        found["baselines"]["jax"] = jax_public(run, kernels_of, expected, timed=timed)
    if "flashinfer" in baselines:
        found["baselines"]["flashinfer"] = absent(why_absent(device_platform) or "not reached")
    if found["us"] is not None:
        seconds = 1e-6 * found["us"]
        found |= {
            "gb_per_s": 1e-9 * unique_bytes / seconds,
            "copy_fraction": unique_bytes / seconds / settings.copy_bytes_per_s,
            "roofline_us": 1e6 * roofline_s,
            "roofline_fraction": roofline_s / seconds,
            "bound": "bytes" if unique_bytes / settings.copy_bytes_per_s >= roofline_s else "flops",
            "rotated_bytes": run.rotated_bytes,
        }
        compare(found)
    return found


def _private(run: CaseRun, expected, timed: bool, target_runs: int) -> dict[str, Any]:
    """Our kernel with every context read by its own row alone."""
    if all(group.hi - group.lo == 1 for level in run.case.levels for group in level):
        return absent("nothing is shared")
    found = run.measure(NO_SHARING, expected, timed=timed, target_runs=(target_runs,))
    return {"name": "ours, nothing shared", "reason": None, **found}


def compare(found: dict[str, Any]) -> None:
    """Puts each baseline's ratio, its time over ours, and the best correct one in front."""
    best = None
    for name, baseline in found["baselines"].items():
        if baseline["us"] is not None:
            baseline["ratio"] = baseline["us"] / found["us"]
            if baseline["correct"] and (best is None or baseline["us"] < found["baselines"][best]["us"]):
                best = name
    found["baseline"] = best
    found["baseline_us"] = None if best is None else found["baselines"][best]["us"]
    found["ratio"] = None if best is None else found["baselines"][best]["ratio"]
