"""What is read from the text of a compiled program, by hand."""

import pytest

from tools.benchmarks.hlo import cost_of

# a loop of a product and a permutation, two parts a round; what it counts in is the second element of its state
WINDOWED = """
%fused_add (p: u32[]) -> u32[] {
  %p = u32[] parameter(0)
  %two = u32[] constant(2)
  ROOT %sum = u32[] add(%p, %two)
}

%body (s: (f32[4,8], u32[])) -> (f32[4,8], u32[]) {
  %s = (f32[4,8]{1,0}, u32[]) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=0
  %i = u32[] get-tuple-element(%s), index=1
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %z = f32[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  NEXT
  ROOT %t = (f32[4,8]{1,0}, u32[]) tuple(%z, %next)
}

%condition (s: (f32[4,8], u32[])) -> pred[] {
  %s = (f32[4,8]{1,0}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%s), index=1
  %end = u32[] constant(7)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %start = (f32[4,8]{1,0}, u32[]) tuple(%x, %zero)
  %loop = (f32[4,8]{1,0}, u32[]) while(%start), condition=%condition, body=%bodyKNOWN
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=0
}
"""
PRODUCT = 2 * 4 * 4 * 8


@pytest.mark.parametrize(
    "following",
    [
        "%two = u32[] constant(2)\n  %next = u32[] add(%i, %two)",
        "%two = u32[] constant(2)\n  %sum = u32[] add(%i, %two)\n  %next = u32[] copy(%sum)",
        "%next = u32[] fusion(%i), kind=kLoop, calls=%fused_add",
    ],
)
def test_a_loop_of_two_parts_a_round_runs_half_as_often(following):
    cost = cost_of(WINDOWED.replace("NEXT", following).replace("KNOWN", ""))
    assert cost.products == 4 * PRODUCT  # at 0, 2, 4 and 6
    assert cost.sent == {"collective-permute": 4 * 4 * 8 * 4}


def test_a_loop_of_one_part_a_round_runs_as_often_as_it_counts():
    following = "%one = u32[] constant(1)\n  %next = u32[] add(%i, %one)"
    assert cost_of(WINDOWED.replace("NEXT", following).replace("KNOWN", "")).products == 7 * PRODUCT


def test_a_compiler_that_says_how_often_is_believed():
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    text = WINDOWED.replace("NEXT", "%next = u32[] multiply(%i, %i)").replace("KNOWN", known)
    assert cost_of(text).products == 5 * PRODUCT


CHAIN = """
%start (p: bf16[4,8]) -> bf16[64,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %gather.1 = bf16[64,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,16], frontend_attributes={chain_id="7"}
  ROOT %begun = bf16[64,8]{1,0} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%step (p: bf16[4,8]) -> bf16[64,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %gather.2 = bf16[64,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,16], frontend_attributes={chain_id="7"}
}

%done (p: bf16[4,8]) -> bf16[64,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %gather.3 = bf16[64,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,16], frontend_attributes={chain_id="7"}
  ROOT %ended = bf16[64,8]{1,0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[4,8]) -> bf16[64,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %a = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%start
  %b = bf16[64,8]{1,0} fusion(%x), kind=kOutput, calls=%step
  %c = bf16[64,8]{1,0} fusion(%x), kind=kOutput, calls=%step
  ROOT %d = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%done
}
"""


def test_what_is_sent_bit_by_bit_beside_products_is_sent_once():
    cost = cost_of(CHAIN)
    assert cost.counts == {"all-gather": 1}
    assert cost.sent == {"all-gather": 15 * 4 * 8 * 2}


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,2,4,6},{1,3,5,7}}",
        "[2,4]<=[4,2]T(1,0)",
        "mesh['data'=2,'fsdp'=4] {'fsdp'}",
        "mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}",
        "mesh['data'=2,'context'=8] {'context':(2)4}",
    ],
)
def test_who_takes_part_is_read_however_it_is_written(groups):
    text = CHAIN.replace('frontend_attributes={chain_id="7"}', "dimensions={0}").replace("[1,16]", groups)
    assert cost_of(text).sent["all-gather"] == 4 * 3 * 4 * 8 * 2  # four of them, as nothing says that they are one


def test_groups_that_cannot_be_read_are_not_taken_for_none():
    with pytest.raises(AssertionError, match="who takes part"):
        cost_of(CHAIN.replace("[1,16]", "V3"))


ACROSS = """
ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (f32[4,8]{1,0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true, frontend_attributes={HANDLER}
  %r = (f32[4,8]{1,0}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true, frontend_attributes={HANDLER}
  %d = (f32[4,8]{1,0}, token[]) recv-done(%r), channel_id=2
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%d), index=0
}
"""


def test_what_is_given_to_the_host_for_other_slices_is_told_apart():
    cost = cost_of(ACROSS.replace("HANDLER", '_xla_host_transfer_handler_name="xla_megascale_runtime"'))
    assert cost.between_slices == 4 * 8 * 4 and not cost.sent
    assert cost_of(ACROSS.replace("HANDLER", '_xla_host_transfer_handler_name="tf_rendezvous"')).between_slices == 0


CALLED = """
ENTRY %main (q: bf16[2,6,3,8]) -> bf16[2,6,3,8] {
  %q = bf16[2,6,3,8]{3,2,1,0} parameter(0)
  %k = bf16[2,5,3,8]{3,2,1,0} parameter(1)
  %a = f32[7,4]{1,0} parameter(2)
  %b = f32[4,9]{1,0} parameter(3)
  %x = f32[1,2,5,5]{3,2,1,0} parameter(4)
  %w = f32[6,2,3,3]{3,2,1,0} parameter(5)
  ROOT %out = CALL
}
"""


@pytest.mark.parametrize(
    "call, flops, kernels",
    [
        (
            '(bf16[2,3,6,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"',
            2 * (2 * 2 * 3 * 6 * 5 * 8),  # queries by keys, and what comes of it by values
            1,
        ),
        (
            '(f32[7,9]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
            '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            2 * 7 * 9 * 4,
            0,
        ),
        (
            "(f32[1,6,3,3]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3}, dim_labels=bf01_oi01->bf01, "
            'custom_call_target="__cudnn$convForward"',
            2 * 3 * 3 * 6 * 2 * 9,
            0,
        ),
    ],
)
def test_products_that_are_left_to_libraries_count(call, flops, kernels):
    cost = cost_of(CALLED.replace("CALL", call))
    assert cost.flops == flops
    assert cost.kernel_calls == kernels


MOVES = """HloModule moves
ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %copying = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%copying)
  %slicing = ((f32[8,16]{1,0:T(8,128)}), f32[2,16]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:16]}
  %part = f32[2,16]{1,0:T(8,128)S(1)} slice-done(%slicing)
  %rows = f32[4,16]{1,0:T(8,128)} slice(%x), slice={[0:4], [0:16]}
  ROOT %back = f32[8,16]{1,0:T(8,128)} copy(%near)
}
"""


def test_what_moves_beside_other_work_is_counted_once():
    row = 16 * 4
    # read to the chip, two rows of it, four to elsewhere in memory, and back from the chip
    assert cost_of(MOVES).traffic == 8 * row + 2 * row + 2 * 4 * row + 8 * row
