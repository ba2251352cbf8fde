"""Launches of a GPU program, from texts as XLA prints them."""

import pytest

from bltjax.costs.launches import count_launches, launches_of_decoding

PROGRAM = """HloModule jit_f

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8]{0} get-tuple-element(%c), index=1
  %j = s32[] fusion(%i), kind=kLoop, calls=%fused
  %y = f32[8]{0} custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  %start = f32[8]{0} fusion-start(%y), kind=kLoop, calls=%fused
  %done = f32[8]{0} fusion-done(%start)
  ROOT %t = (s32[], f32[8]{0}) tuple(%j, %done)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%short (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}

%long (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %a = f32[8]{0} copy(%x)
  %b = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused
  ROOT %s = f32[8]{0} sort(%b), dimensions={0}
}

ENTRY %main (x: f32[8], i: s32[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %i = s32[] parameter(1)
  %t = (s32[], f32[8]{0}) tuple(%i, %x)
  %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body LOOP
  %y = f32[8]{0} get-tuple-element(%w), index=1
  %copy = f32[8]{0} copy(%y)
  ROOT %c = f32[8]{0} conditional(%i, %copy, %copy), branch_computations={%short, %long}
}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize("loop, rounds, syncs", [(KNOWN, 5, 1), ("", 1, 1 + 2)])
def test_a_program(loop, rounds, syncs):
    """Three kernels a round, one of them of a library; the longer branch has two and a copy."""
    found = count_launches(PROGRAM.replace(" LOOP", loop))
    conditions = 0 if loop else 2
    assert found.kernels == 3 * rounds + conditions + 2
    assert found.copies == 1 + 1 and found.total == found.kernels + 2
    assert found.host_syncs == syncs
    assert found.library_calls == {"__cudnn$fmhaSoftmax": rounds}


def test_of_a_byte_and_of_a_patch():
    """The open loop writes a byte a round; what it branches to is a call for a patch."""
    way = "branch_computations={%short, %long}"
    branch = f"%q = f32[8]{{0}} conditional(%i, %done, %done), {way}"
    body = "%done = f32[8]{0} fusion-done(%start)\n"
    assert body in PROGRAM
    text = PROGRAM.replace(body, body + f"  {branch}\n").replace(" LOOP", "")
    assert launches_of_decoding(text) == dict(byte=3, patch=3)
