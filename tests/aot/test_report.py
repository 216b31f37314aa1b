"""How numbers of a compiler become a report."""

import json

import pytest

from apr_jax.aot.gpu_kernels import find_kernels, parse_ptxas
from apr_jax.aot.hlo import Copy
from apr_jax.aot.report import StepReport, summary
from apr_jax.aot.target import find_target

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'paged_attention' for 'sm_80'
ptxas info    : Function properties for paged_attention
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 251 registers, used 1 barriers, 1024 bytes smem, 432 bytes cmem[0]
"""
PTX = """.version 8.0
.target sm_80
// wgmma.mma_async in a comment is none
.visible .entry paged_attention(
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1};
@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;
cp.async.commit_group;
cp.async.bulk.tensor.4d.shared::cluster.global [%r1];
"""


def step(**changes) -> StepReport:
    numbers = {
        "argument_bytes": 900, "aliased_bytes": 500, "output_bytes": 510, "temp_bytes": 40, "code_bytes": 5,
        "cache_bytes": 500, "read_bytes": 700, "read_ms": 0.1, "device_memory": 1000,
    }  # fmt: skip
    return StepReport(**({"name": "decode", "compiles": True, "error": [], "seconds": 1.0} | numbers | changes))


def test_memory():
    assert step().used_bytes == 900 + 40 + 5 + 10
    assert step().fits is True
    assert step(temp_bytes=100).fits is False


def test_the_cache_is_copied_if_it_is_not_aliased():
    assert step().cache_copied is False
    assert step(aliased_bytes=499).cache_copied is True
    assert step(page_copies=[Copy("pages", "copy.1", 100, True)]).cache_copied is True


def test_the_summary_takes_the_worst():
    prefill = step(name="prefill", temp_bytes=60, weight_copies=[Copy("params", "copy.1", 100, False)])
    both = summary([prefill, step(aliased_bytes=400)])
    assert both["compiles"] and both["cache_copied"] and both["weights_copied"]
    assert (both["temp_bytes"], both["aliased_bytes"], both["cache_bytes"]) == (60, 400, 500)
    assert both["spills"] is None, "nobody said anything of kernels"
    json.dumps(both | {"step": prefill.as_object()})


def test_a_step_that_does_not_compile():
    target = find_target("v5e:2x4")
    refused = StepReport.failed("decode", 2.0, ["XlaRuntimeError: no"], cache_bytes=5, read_bytes=819, target=target)
    assert refused.read_ms == pytest.approx(1e-6)
    both = summary([step(), refused])
    assert both["compiles"] is False
    assert both["cache_copied"] is both["weights_copied"] is both["fits"] is None


def test_ptxas():
    kernel = parse_ptxas("paged_attention", PTXAS.format(stack=0, stores=0, loads=0), PTX)
    assert (kernel.registers, kernel.spill_bytes, kernel.shared_bytes) == (251, 0, 1024)
    assert kernel.instructions == {"mma.sync": 1, "cp.async": 1, "cp.async.bulk.tensor": 1}
    spilling = parse_ptxas("paged_attention", PTXAS.format(stack=16, stores=24, loads=20), PTX)
    assert step(kernels=[kernel, spilling]).spills == 44
    assert step(kernels=[]).spills is None, "no kernel was found: that is no proof"
    with pytest.raises(RuntimeError, match="says nothing of paged_attention"):
        parse_ptxas("paged_attention", "", PTX)


def test_kernels_are_told_from_xlas(tmp_path):
    ptxas = tmp_path / "ptxas"
    ptxas.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{PTXAS.format(stack=0, stores=0, loads=0)}END\n")
    ptxas.chmod(0o755)
    for number, name in enumerate(("paged_attention", "paged_attention_1", "gemm_fusion_dot")):
        (tmp_path / f"module_0001.jit_decode.{number}.ptx").write_text(PTX.replace("paged_attention(", f"{name}("))
    (tmp_path / "anonymous_0.ptx").write_text(PTX.replace("paged_attention(", "mosaic(").replace("mma.sync", "add"))
    call = "call ptr @mosaic_gpu_get_function(ptr %3, ptr @anonymous_mosaic_gpu_kernel_name, i32 201816, i32 1)"
    (tmp_path / "anonymous_0.ll").write_text(f"  %4 = {call}\n")
    thunks = (
        "034: kCustomKernel [prev=033] paged_attention grid: [4, 1, 1] threads: [256, 1, 1]  shared_memory: 65792 bytes"
    )
    kernels = find_kernels(sorted(tmp_path.glob("*.ptx")), {"paged_attention"}, ptxas, thunks)
    assert [kernel.name for kernel in kernels] == ["mosaic", "paged_attention"], "two layers' kernels are one"
    assert [kernel.shared_bytes for kernel in kernels] == [1024 + 201816, 1024 + 65792]
