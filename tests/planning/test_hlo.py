"""The reader of compiled programs, on text in the forms that the CPU, GPU and TPU compilers write."""

import jax
import jax.numpy as jnp
import pytest

from sympow_jax.planning import hlo, work
from sympow_jax.planning.collectives import axes_of, collectives, summed
from sympow_jax.planning.traffic import memory_bytes

TEXT = """HloModule step, is_scheduled=true

%body (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %arg = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %w = f32[8,8]{1,0} constant({...})
  %dot.1 = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %ag = f32[16,8]{1,0} all-gather(%dot.1), replica_groups=GROUPS, dimensions={0}, use_global_device_ids=true
  %s = f32[4,8]{1,0} slice(%ag), slice={[0:4], [0:8]}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %s)
}

%condition (arg.1: (s32[], f32[4,8])) -> pred[] {
  %arg.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %p)
  %while.1 = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%bodyEXTRA
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%while.1), index=1
}
"""
MESH = {"data": 2, "fsdp": 1, "tensor": 1, "seq": 4}


def program(groups="{{0,1,2,3},{4,5,6,7}}", extra=""):
    return hlo.parse(TEXT.replace("GROUPS", groups).replace("EXTRA", extra))


@pytest.mark.parametrize(
    ("extra", "trips"),
    [
        ("", 12),
        (', backend_config={"known_trip_count":{"n":"5"}}', 5),
        (', metadata={op_name="jit(f)/jvp()/trips_4.5/while" stack_frame_id=3}', 4.5),
        (', metadata={op_name="jit(f)/trips_4.5/while/body/while"}', 12),  # the scope is that of the loop around it
        (', metadata={op_name="jit(f)/trips_8/while/body/trips_4_in_all/while"}', 0.5),
    ],
)
def test_loops_multiply_what_is_inside(extra, trips):
    assert work.flops(program(extra=extra)) == {"float32": trips * 2 * 4 * 8 * 8}


def test_a_loop_of_unknown_length_is_named_and_turns_once():
    data = ', metadata={op_name="jit(f)/while"}'
    found = hlo.parse(TEXT.replace("constant(12)", "copy(%i.1)").replace("EXTRA", data).replace("GROUPS", "{{0}}"))
    assert found.unknown_loops() == {"jit(f)/while"}
    assert work.flops(found) == {"float32": 2 * 4 * 8 * 8}
    assert program().unknown_loops() == set()


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "seq"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("[2,4]<=[8]", "seq"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("[1,8]<=[8]", "data+seq"),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "seq"),
        ("mesh['axis_0'=8] {'axis_0'}", "data+seq"),
    ],
)
def test_collectives_by_axis_and_bytes(groups, axis):
    (found,) = collectives(program(groups), MESH)
    size = {"seq": 4, "data": 2, "data+seq": 8}[axis]
    assert (found.kind, found.axis, len(found.group)) == ("all-gather", axis, size)
    assert found.bytes == 12 * (size - 1) * 4 * 8 * 4


def test_a_permute_sends_its_operand_along_the_axis_of_its_pairs():
    gather = "all-gather(%dot.1), replica_groups=GROUPS, dimensions={0}, use_global_device_ids=true"
    permute = "collective-permute-start(%dot.1), source_target_pairs={{0,0},{1,2},{2,3}}"
    assert gather in TEXT
    found = collectives(hlo.parse(TEXT.replace(gather, permute).replace("EXTRA", "")), MESH)
    assert [(c.kind, c.axis, c.bytes) for c in found] == [("collective-permute", "seq", 12 * 4 * 8 * 4)]


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        ("all-reduce(%dot.1), replica_groups=GROUPS, to_apply=%add", 2 * 3 / 4),
        ("reduce-scatter(%dot.1), replica_groups=GROUPS, dimensions={0}, to_apply=%add", 3 / 4),
        ("all-to-all(%dot.1), replica_groups=GROUPS, dimensions={0}", 3 / 4),
        ("all-gather(%dot.1), replica_groups=GROUPS, dimensions={0}", 3),
    ],
)
def test_bytes_that_one_of_four_devices_sends_of_its_array(operation, sent):
    """A ring over n devices: n - 1 rounds of a piece each way of a reduction, and of the whole array in a gather."""
    gather = "all-gather(%dot.1), replica_groups=GROUPS, dimensions={0}, use_global_device_ids=true"
    text = TEXT.replace(gather, operation).replace("GROUPS", "{{0,1,2,3},{4,5,6,7}}").replace("EXTRA", "")
    (found,) = collectives(hlo.parse(text), MESH)
    assert found.bytes == 12 * sent * 4 * 8 * 4


def test_axes_of_a_permute():
    assert axes_of((1, 2), MESH) == "seq"
    assert axes_of((0, 4), MESH) == "data"


def test_memory_traffic_counts_a_slice_of_a_large_array_once():
    table = jax.ShapeDtypeStruct((512, 1024), jnp.float32)

    def last_rows(x):
        return jax.lax.fori_loop(0, 8, lambda i, total: total + x[i] * 2.0, jnp.zeros(1024))

    text = jax.jit(last_rows).lower(table).compile().as_text()
    rows = 8 * 1024 * 4
    assert rows <= memory_bytes(hlo.parse(text)) < 8 * rows


def test_memory_traffic_of_a_started_slice_is_what_it_cuts_out():
    text = """HloModule step

ENTRY %main (p: f32[1000,8]) -> f32[2,8] {
  %p = f32[1000,8]{1,0} parameter(0)
  %start = (f32[1000,8]{1,0}, f32[2,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[4:6], [0:8]}
  ROOT %done = f32[2,8]{1,0:T(8,128)S(1)} slice-done(%start)
}
"""
    assert memory_bytes(hlo.parse(text)) == 2 * 8 * 4  # read from memory into VMEM


def test_memory_traffic_looks_into_fusions_of_fusions():
    text = """HloModule nested
%inner (p: f32[64,8], i: s32[]) -> f32[1,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
}
%outer (q: f32[64,8], j: s32[]) -> f32[1,8] {
  %q = f32[64,8]{1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %f = f32[1,8]{1,0} fusion(%q, %j), kind=kLoop, calls=%inner
}
ENTRY %main (x: f32[64,8], k: s32[]) -> f32[1,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %g = f32[1,8]{1,0} fusion(%x, %k), kind=kOutput, calls=%outer
}"""
    row, index = 8 * 4, 4
    assert memory_bytes(hlo.parse(text)) == 2 * row + index


UPDATE = """HloModule step
%fused (p: f32[64,8], u: f32[2,8], i: s32[]) -> f32[64,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %u = f32[2,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %d = f32[64,8]{1,0} dynamic-update-slice(%p, %u, %i, %zero)
}
ENTRY %main (x: f32[64,8], y: f32[2,8], k: s32[], n: s32[3,1]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %y = f32[2,8]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %n = s32[3,1]{1,0} parameter(3)
  %z = s32[] constant(0)
  ROOT %r = f32[64,8]{1,0} OPERATION
}"""


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("dynamic-update-slice(%x, %y, %k, %z)", 2 * 2 * 8 * 4),  # the update is read and written
        ("scatter(%x, %n, %y), to_apply=%add", 2 * 2 * 8 * 4),
        ("fusion(%x, %y, %k), kind=kLoop, calls=%fused", 2 * 2 * 8 * 4 + 4),  # and its place
    ],
)
def test_memory_traffic_of_an_update_in_place_is_the_update(operation, expected):
    assert memory_bytes(hlo.parse(UPDATE.replace("OPERATION", operation))) == expected


def test_a_convolution_in_groups_of_the_batch_counts_the_outputs_that_it_makes():
    """Of 8 rows in 4 groups, 2 rows of 16 x 12 outputs, 5 features in, 3 positions of which the ends lack one each."""
    text = """HloModule step
ENTRY %main (x: f32[8,16,5], w: f32[3,5,12]) -> f32[2,16,12] {
  %x = f32[8,16,5]{2,1,0} parameter(0)
  %w = f32[3,5,12]{2,1,0} parameter(1)
  ROOT %c = f32[2,16,12]{2,1,0} convolution(%x, %w), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f, batch_group_count=4
}"""  # noqa: E501
    assert work.flops(hlo.parse(text)) == {"float32": 2 * 2 * 12 * 5 * (3 * 16 - 2)}


def test_convolution_window_of_a_batched_product():
    # a batch of 4 as a spatial dim with dilation, as the TPU compiler writes it: one valid position for each output
    assert work._valid_positions(4, 4, size=4, stride=3, lhs_dilate=4, rhs_dilate=1, low=0) == 4
    assert work._valid_positions(8, 8, size=3, stride=1, lhs_dilate=1, rhs_dilate=1, low=1) == 22


def test_programs_on_a_mesh_of_this_machine_agree_with_arithmetic():
    x = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((3, 128, 128), jnp.bfloat16)

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    found = hlo.parse(jax.jit(layers).lower(x, w).compile().as_text())
    assert sum(work.flops(found).values()) == 3 * 2 * 256 * 128 * 128
    assert summed(collectives(found, {"data": 1})) == []


# A gather of TPUs in three pieces: one begins it, one goes on with it beside a product, one ends it.
PIECES = """HloModule step
%begin (a: f32[4,8]) -> (f32[4,8], f32[16,8], u32[]) {
  %a = f32[4,8]{1,0} parameter(0)
  %g = f32[16,8]{1,0} all-gather(%a), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, FIRST
  %f = u32[]{:S(2)} constant(0)
  ROOT %t = (f32[4,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}) tuple(%a, %g, %f)
}
%middle (b: f32[4,8], whole: f32[16,8], x: f32[4,8], w: f32[8,8]) -> (f32[4,8], f32[4,8], f32[16,8]) {
  %x = f32[4,8]{1,0} parameter(2)
  %w = f32[8,8]{1,0} parameter(3)
  %d = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %b = f32[4,8]{1,0} parameter(0)
  %whole = f32[16,8]{1,0} parameter(1)
  %h = f32[16,8]{1,0} all-gather(%b), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, LATER
  ROOT %u = (f32[4,8]{1,0}, f32[4,8]{1,0}, f32[16,8]{1,0}) tuple(%d, %b, %h)
}
%end (c: f32[4,8], full: f32[16,8]) -> f32[16,8] {
  %c = f32[4,8]{1,0} parameter(0)
  %full = f32[16,8]{1,0} parameter(1)
  ROOT %i = f32[16,8]{1,0} all-gather(%c), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, LATER
}
ENTRY %main (p: f32[4,8], q: f32[4,8], r: f32[8,8]) -> (f32[16,8], f32[4,8]) {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[4,8]{1,0} parameter(1)
  %r = f32[8,8]{1,0} parameter(2)
  %one = (f32[4,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %own = f32[4,8]{1,0} get-tuple-element(%one), index=0
  %all = f32[16,8]{1,0} get-tuple-element(%one), index=1
  %two = (f32[4,8]{1,0}, f32[4,8]{1,0}, f32[16,8]{1,0}) fusion(%own, %all, %q, %r), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%middle
  %product = f32[4,8]{1,0} get-tuple-element(%two), index=0
  %own.1 = f32[4,8]{1,0} get-tuple-element(%two), index=1
  %all.1 = f32[16,8]{1,0} get-tuple-element(%two), index=2
  %three = f32[16,8]{1,0} fusion(%own.1, %all.1), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
  ROOT %out = (f32[16,8]{1,0}, f32[4,8]{1,0}) tuple(%three, %product)
}"""  # noqa: E501


def test_a_collective_in_pieces_is_sent_and_written_once():
    """And the product beside one of them reads and writes its own arrays alone."""
    config = 'backend_config={"async_collective_fusion_config":{"flag_start":"%d"}}'
    found = hlo.parse(PIECES.replace("FIRST", config % -1).replace("LATER", config % 2))
    (gather,) = collectives(found, MESH)
    assert (gather.count, gather.bytes) == (1, 3 * 4 * 8 * 4)
    gathered, product = (4 + 16) * 8 * 4, (4 + 8 + 4) * 8 * 4
    assert memory_bytes(found) == gathered + product
