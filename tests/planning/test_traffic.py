"""The cache of GPUs in the account of memory traffic."""

import pytest

from sympow_jax.planning import hlo
from sympow_jax.planning.traffic import memory_bytes

# A loop that carries a small array, reads a slice of a large one in each turn, and leaves an array behind in between.
LOOP = """HloModule step
%body (arg: (f32[64], f32[10,64])) -> (f32[64], f32[10,64]) {
  %arg = (f32[64]{0}, f32[10,64]{1,0}) parameter(0)
  %total = f32[64]{0} get-tuple-element(%arg), index=0
  %table = f32[10,64]{1,0} get-tuple-element(%arg), index=1
  %row = f32[1,64]{1,0} slice(%table), slice={[0:1], [0:64]}
  %flat = f32[64]{0} bitcast(%row)
  %sum = f32[64]{0} add(%total, %flat)
  ROOT %t = (f32[64]{0}, f32[10,64]{1,0}) tuple(%sum, %table)
}
%condition (arg.1: (f32[64], f32[10,64])) -> pred[] {
  %arg.1 = (f32[64]{0}, f32[10,64]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}
ENTRY %main (x: f32[64], y: f32[10,64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %y = f32[10,64]{1,0} parameter(1)
  %start = (f32[64]{0}, f32[10,64]{1,0}) tuple(%x, %y)
  %loop = (f32[64]{0}, f32[10,64]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  ROOT %out = f32[64]{0} get-tuple-element(%loop), index=0
}"""  # noqa: E501
ROW = 64 * 4


@pytest.mark.parametrize(
    ("cache", "rows"),
    [
        (0, 10 * 5),  # no cache: a slice read and written, two operands and a result in every turn
        (5 * ROW, 10 + 1 + 1),  # the slices of an array that does not fit, the first total, and the last one
        (ROW, 10 + 10 * 2 + 10 * 2),  # one array fits: the slice, but not the total that it is added to
    ],
)
def test_what_a_cache_holds_does_not_pass_through_memory(cache, rows):
    assert memory_bytes(hlo.parse(LOOP), (), cache) <= rows * ROW
    if cache != ROW:
        assert memory_bytes(hlo.parse(LOOP), (), cache) == rows * ROW


def test_a_smaller_cache_saves_less():
    found = [memory_bytes(hlo.parse(LOOP), (), rows * ROW) for rows in (0, 1, 2, 3, 5, 20)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


# In each turn a row of an array that fits is set, and an array of the cache's size pushes it out.
ROWS = """HloModule step
%body (arg: (f32[4,64], s32[])) -> (f32[4,64], s32[]) {
  %arg = (f32[4,64]{1,0}, s32[]) parameter(0)
  %rows = f32[4,64]{1,0} get-tuple-element(%arg), index=0
  %i = s32[] get-tuple-element(%arg), index=1
  %large = f32[4,64]{1,0} custom-call(), custom_call_target="make"
  %row = f32[1,64]{1,0} slice(%large), slice={[0:1], [0:64]}
  %set = f32[4,64]{1,0} dynamic-update-slice(%rows, %row, %i, %i)
  ROOT %t = (f32[4,64]{1,0}, s32[]) tuple(%set, %i)
}
%condition (arg.1: (f32[4,64], s32[])) -> pred[] {
  %arg.1 = (f32[4,64]{1,0}, s32[]) parameter(0)
  ROOT %go = pred[] constant(true)
}
ENTRY %main (x: f32[4,64], i: s32[]) -> f32[4,64] {
  %x = f32[4,64]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %start = (f32[4,64]{1,0}, s32[]) tuple(%x, %j)
  %loop = (f32[4,64]{1,0}, s32[]) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"100"}}
  ROOT %out = f32[4,64]{1,0} get-tuple-element(%loop), index=0
}"""  # noqa: E501


def test_memory_gets_the_rows_that_were_set_and_not_the_array_that_they_are_in():
    assert memory_bytes(hlo.parse(ROWS), (), 5 * ROW) <= 2 * 100 * ROW
