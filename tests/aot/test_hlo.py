"""What counts as a copy, on small programs in the form that XLA prints."""

from apr_jax.aot.hlo import Program

WEIGHT = "bf16[512,256]"  # 256 KiB
STORE = "bf16[8,33,16,128]"


def program(entry: str, *computations: str) -> Program:
    """A module of one weight, %w, one page store, %p, and activations %x of the weight's shape."""
    parameters = f"""
  %w = {WEIGHT}{{1,0}} parameter(0), metadata={{op_name="params[\\'layers\\'][0][\\'mlp\\'][\\'up\\'].value"}}
  %p = {STORE}{{3,2,1,0}} parameter(1), metadata={{op_name="pages[0].k"}}
  %x = {WEIGHT}{{1,0}} parameter(2), metadata={{op_name="tokens"}}"""
    lines = "\n".join("  " + line.strip() for line in entry.strip().splitlines())
    text = f"ENTRY %main (w: {WEIGHT}, p: {STORE}, x: {WEIGHT}) -> f32[] {{{parameters}\n{lines}\n}}\n"
    return Program("HloModule jit_decode, is_scheduled=true\n\n" + "\n\n".join((*computations, text)))


def weights(found: Program) -> list[tuple[str, bool]]:
    return [(copy.instruction, copy.in_loop) for copy in found.copied_weights()]


def pages(found: Program) -> list[tuple[str, bool]]:
    return [(copy.instruction, copy.in_loop) for copy in found.copied_pages([(8, 33, 16, 128)])]


def test_a_weight_copied_before_its_product():
    found = program(f"""
        %copy.1 = {WEIGHT}{{0,1}} copy(%w)
        %copy.2 = {WEIGHT}{{0,1}} copy(%x)
        ROOT %dot.1 = f32[] custom-call(%copy.1, %copy.2), custom_call_target="dot"
    """)
    (copy,) = found.copied_weights()
    assert (copy.of, copy.bytes) == ("params['layers'][0]['mlp']['up'].value", 512 * 256 * 2)
    assert weights(found) == [("copy.1", False)], "the activation of the same shape is none"
    assert pages(found) == []


def test_reading_a_weight_ahead_is_no_copy():
    found = program(f"""
        %copy-start.1 = ({WEIGHT}{{1,0:T(8,128)(2,1)S(1)}}, {WEIGHT}{{1,0:T(8,128)}}, u32[]{{:S(2)}}) copy-start(%w)
        %copy-done.1 = {WEIGHT}{{1,0:T(8,128)(2,1)S(1)}} copy-done(%copy-start.1)
        ROOT %dot.1 = f32[] custom-call(%copy-done.1), custom_call_target="dot"
    """)
    assert weights(found) == []


def test_a_copy_of_what_was_read_ahead_is_one():
    found = program(f"""
        %copy-start.1 = ({WEIGHT}{{1,0:S(1)}}, {WEIGHT}{{1,0}}, u32[]{{:S(2)}}) copy-start(%w)
        %copy-done.1 = {WEIGHT}{{1,0:S(1)}} copy-done(%copy-start.1)
        ROOT %copy.1 = {WEIGHT}{{0,1}} copy(%copy-done.1)
    """)
    assert weights(found) == [("copy.1", False)]


def test_a_copy_on_another_core_is_one():
    """As a tpu7x lays weights out anew: started with nothing, given the weight later, in computations of its own."""
    copying = """%copying (a: bf16[512,256]) -> bf16[512,256] {
  %a = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.1 = bf16[512,256]{1,0:T(16,128)(2,1)} copy(%a)
}"""
    calling = """%calling (b: bf16[512,256]) -> bf16[512,256] {
  %b = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %call.1 = bf16[512,256]{1,0:T(16,128)(2,1)} custom-call(%b), called_computations={%copying}
}"""
    found = program(
        f"""
        %start.1 = ((), (), (s32[16]{{0}})) async-start(), async_execution_thread="sparsecore", calls=%calling
        %update.1 = (({WEIGHT}{{1,0}}), {WEIGHT}{{1,0:T(16,128)(2,1)}}, (s32[16]{{0}})) async-update(%start.1, %w)
        %done.1 = {WEIGHT}{{1,0:T(16,128)(2,1)}} async-done(%update.1)
        ROOT %dot.1 = f32[] custom-call(%done.1), custom_call_target="dot"
        """,
        copying,
        calling,
    )
    assert weights(found) == [("copy.1", False)]


def test_gathering_a_split_weight_copies_it():
    found = program("""
        %all-gather-start.1 = (bf16[512,256]{1,0}, bf16[512,2048]{1,0}) all-gather-start(%w), dimensions={1}
        %all-gather-done.1 = bf16[512,2048]{1,0} all-gather-done(%all-gather-start.1)
        ROOT %all-reduce.1 = f32[] all-reduce(%all-gather-done.1), to_apply=%add
    """)
    assert weights(found) == [("all-gather-start.1", False)]
    assert found.copied_weights()[0].bytes == 512 * 2048 * 2
    assert found.collectives() == {"all-reduce": 1, "all-gather": 1}


def test_a_copy_within_the_loop():
    body = f"""%body (arg: (s32[], {WEIGHT}, {STORE})) -> (s32[], {WEIGHT}, {STORE}) {{
  %arg = (s32[], {WEIGHT}{{1,0}}, {STORE}{{3,2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %loop_w = {WEIGHT}{{1,0}} get-tuple-element(%arg), index=1
  %loop_p = {STORE}{{3,2,1,0}} get-tuple-element(%arg), index=2
  %transpose_fusion = bf16[256,512]{{1,0}} fusion(%loop_w), kind=kLoop, calls=%moving
  %copy.7 = {STORE}{{3,2,1,0}} copy(%loop_p)
  ROOT %out = (s32[], {WEIGHT}{{1,0}}, {STORE}{{3,2,1,0}}) tuple(%i, %loop_w, %copy.7)
}}"""
    moving = """%moving (a: bf16[512,256]) -> bf16[256,512] {
  %a = bf16[512,256]{1,0} parameter(0)
  ROOT %transpose.1 = bf16[256,512]{1,0} transpose(%a), dimensions={1,0}
}"""
    found = program(
        f"""
        %zero = s32[] constant(0)
        %start = (s32[], {WEIGHT}{{1,0}}, {STORE}{{3,2,1,0}}) tuple(%zero, %w, %p)
        ROOT %while.1 = (s32[], {WEIGHT}{{1,0}}, {STORE}{{3,2,1,0}}) while(%start), condition=%more, body=%body
        """,
        moving,
        body,
    )
    assert weights(found) == [("transpose_fusion", True)]
    assert pages(found) == [("copy.7", True)]


def test_a_fusion_that_computes_is_no_copy():
    computing = """%computing (a: bf16[512,256]) -> bf16[512,256] {
  %a = bf16[512,256]{1,0} parameter(0)
  %t = bf16[512,256]{0,1} copy(%a)
  ROOT %add.1 = bf16[512,256]{1,0} add(%t, %a)
}"""
    found = program(f"ROOT %f = {WEIGHT}{{1,0}} fusion(%w), kind=kLoop, calls=%computing", computing)
    assert weights(found) == []


def test_updates_in_place_are_no_copies():
    update = """%update (a: bf16[8,33,16,128], b: bf16[8,1,1,128]) -> bf16[8,33,16,128] {
  %a = bf16[8,33,16,128]{3,2,1,0} parameter(0)
  %b = bf16[8,1,1,128]{3,2,1,0} parameter(1)
  ROOT %scatter.1 = bf16[8,33,16,128]{3,2,1,0} scatter(%a, %b, %b), to_apply=%add
}"""
    found = program(
        f"""
        %one = bf16[8,1,1,128]{{3,2,1,0}} constant(0)
        %fused = {STORE}{{3,2,1,0}} fusion(%p, %one), kind=kInput, calls=%update
        %kernel = {STORE}{{3,2,1,0}} custom-call(%fused), custom_call_target="k", output_to_operand_aliasing={{{{}}: (0, {{}})}}
        %view = bf16[8,528,128]{{2,1,0}} bitcast(%kernel)
        ROOT %dynamic-update-slice.1 = {STORE}{{3,2,1,0}} dynamic-update-slice(%kernel, %one)
        """,  # noqa: E501
        update,
    )
    assert pages(found) == []


def test_what_writes_the_pages_anew():
    masking = """%masking (a: bf16[8,33,16,128]) -> bf16[8,33,16,128] {
  %a = bf16[8,33,16,128]{3,2,1,0} parameter(0)
  ROOT %select.1 = bf16[8,33,16,128]{3,2,1,0} select(%a, %a, %a)
}"""
    found = program(
        f"""
        %masked = {STORE}{{3,2,1,0}} fusion(%p), kind=kLoop, calls=%masking
        %fresh = {STORE}{{3,2,1,0}} custom-call(%masked), custom_call_target="k"
        ROOT %moved = bf16[33,8,16,128]{{3,2,1,0:T(8,128)(2,1)S(1)}} copy(%fresh)
        """,
        masking,
    )
    assert pages(found) == [("masked", False), ("fresh", False), ("moved", False)]
    assert [copy.on_chip for copy in found.copied_pages([(8, 33, 16, 128)])] == [False, False, True]


def test_collectives_by_kind_count_a_pair_once():
    found = program("""
        %all-reduce-start.1 = f32[4] all-reduce-start(%x), to_apply=%add
        %all-reduce-done.1 = f32[4] all-reduce-done(%all-reduce-start.1)
        %collective-permute.1 = f32[4] collective-permute(%x), source_target_pairs={{0,1}}
        ROOT %all-reduce.2 = f32[] all-reduce(%x), to_apply=%add
    """)
    assert found.collectives() == {"all-reduce": 2, "collective-permute": 1}
