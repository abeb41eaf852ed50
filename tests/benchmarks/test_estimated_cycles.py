"""Cycles of programs that were written by hand: loops in loops, bounds from afar, branches, kernels."""

import subprocess
import sys
from collections import Counter

import pytest

from benchmarks import aot
from benchmarks.estimated_cycles import estimate


def cycles(count: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}","ml_estimated_microseconds":0}}}}'


PROGRAM = f"""
HloModule jit_step

%fused (param_0.1: f32[8,128]) -> f32[8,128] {{
  %param_0.1 = f32[8,128]{{1,0}} parameter(0)
  ROOT %inside.1 = f32[8,128]{{1,0}} negate(%param_0.1), {cycles(1_000_000)}
}}

%inner_body (arg.2: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {{
  %arg.2 = (s32[], f32[8,128]{{1,0}}, s32[]) parameter(0)
  %two.2 = s32[] constant(2)
  %counter.2 = s32[] get-tuple-element(%arg.2), index=0
  %bound.2 = s32[] get-tuple-element(%arg.2), index=2
  %x.2 = f32[8,128]{{1,0}} get-tuple-element(%arg.2), index=1
  %work.2 = f32[8,128]{{1,0}} fusion(%x.2), kind=kLoop, calls=%fused, {cycles(10)}
  %attention.12 = f32[8,128]{{1,0}} custom-call(%work.2), custom_call_target="tpu_custom_call"
  %next.2 = s32[] add(%two.2, %counter.2)
  ROOT %out.2 = (s32[], f32[8,128]{{1,0}}, s32[]) tuple(%next.2, %attention.12, %bound.2)
}}

%inner_condition (arg.3: (s32[], f32[8,128], s32[])) -> pred[] {{
  %arg.3 = (s32[], f32[8,128]{{1,0}}, s32[]) parameter(0)
  %counter.3 = s32[] get-tuple-element(%arg.3), index=0
  %bound.3 = s32[] get-tuple-element(%arg.3), index=2
  ROOT %less.3 = pred[] compare(%counter.3, %bound.3), direction=LT
}}

%outer_body (arg.4: (s32[], f32[8,128], s32[], s32[])) -> (s32[], f32[8,128], s32[], s32[]) {{
  %arg.4 = (s32[], f32[8,128]{{1,0}}, s32[], s32[]) parameter(0)
  %down.4 = s32[] constant(-1)
  %zero.4 = s32[] constant(0)
  %counter.4 = s32[] get-tuple-element(%arg.4), index=0
  %x.4 = f32[8,128]{{1,0}} get-tuple-element(%arg.4), index=1
  %bound.4 = s32[] get-tuple-element(%arg.4), index=2
  %other.4 = s32[] get-tuple-element(%arg.4), index=3
  %begin.4 = s32[] copy(%zero.4)
  %entering.4 = (s32[], f32[8,128]{{1,0}}, s32[]) tuple(%begin.4, %x.4, %bound.4)
  %inner.4 = (s32[], f32[8,128]{{1,0}}, s32[]) while(%entering.4), condition=%inner_condition, body=%inner_body
  %y.4 = f32[8,128]{{1,0}} get-tuple-element(%inner.4), index=1
  %plain.4 = f32[8,128]{{1,0}} copy(%y.4), {cycles(100)}
  %sorted.4 = f32[8,128]{{1,0}} sort(%plain.4), dimensions={{1}}, to_apply=%smaller
  %next.4 = s32[] add(%counter.4, %down.4)
  ROOT %out.4 = (s32[], f32[8,128]{{1,0}}, s32[], s32[]) tuple(%next.4, %sorted.4, %bound.4, %other.4)
}}

%compared (param_0.5: s32[], param_1.5: s32[]) -> pred[] {{
  %param_0.5 = s32[] parameter(0)
  %param_1.5 = s32[] parameter(1)
  ROOT %more.5 = pred[] compare(%param_1.5, %param_0.5), direction=GE
}}

%outer_condition (arg.6: (s32[], f32[8,128], s32[], s32[])) -> pred[] {{
  %arg.6 = (s32[], f32[8,128]{{1,0}}, s32[], s32[]) parameter(0)
  %one.6 = s32[] constant(1)
  %counter.6 = s32[] get-tuple-element(%arg.6), index=0
  ROOT %more.6 = pred[] fusion(%one.6, %counter.6), kind=kLoop, calls=%compared
}}

%called (x.7: f32[8,128]) -> f32[8,128] {{
  %x.7 = f32[8,128]{{1,0}} parameter(0)
  ROOT %work.7 = f32[8,128]{{1,0}} fusion(%x.7), kind=kLoop, calls=%fused, {cycles(10_000)}
}}

%long (x.8: f32[8,128]) -> f32[8,128] {{
  %x.8 = f32[8,128]{{1,0}} parameter(0)
  %moved.8 = f32[8,128]{{1,0}} copy(%x.8), {cycles(20_000)}
  ROOT %made.8 = f32[8,128]{{1,0}} call(%moved.8), to_apply=%called
}}

%short (x.9: f32[8,128]) -> f32[8,128] {{
  %x.9 = f32[8,128]{{1,0}} parameter(0)
  ROOT %moved.9 = f32[8,128]{{1,0}} copy(%x.9), {cycles(25_000)}
}}

ENTRY %main (a: f32[8,128], p: pred[]) -> f32[8,128] {{
  %a = f32[8,128]{{1,0}} parameter(0)
  %p = pred[] parameter(1)
  %four = s32[] constant(4)
  %bound = s32[] constant(5)
  %fetch = (f32[8,128]{{1,0:S(1)}}, f32[8,128]{{1,0}}, u32[]{{:S(2)}}) copy-start(%a)
  %fetched = f32[8,128]{{1,0:S(1)}} copy-done(%fetch)
  %entering = (s32[], f32[8,128]{{1,0}}, s32[], s32[]) tuple(%four, %fetched, %bound, %OTHER)
  %outer = (s32[], f32[8,128]{{1,0}}, s32[], s32[]) while(%entering), condition=%outer_condition, body=%outer_body
  %y = f32[8,128]{{1,0}} get-tuple-element(%outer), index=1
  ROOT %either = f32[8,128]{{1,0}} conditional(%p, %y, %y), true_computation=%short, false_computation=%long
}}
""".replace("%OTHER", "%four")


def test_loops_count_as_often_as_they_turn():
    # the outer counter is 4, 3, 2, 1; the inner one 0, 2, 4; the longer branch copies and calls
    found = estimate(PROGRAM)
    assert found.cycles == 4 * (100 + 3 * 10) + 20_000 + 10_000
    assert found.kernels == Counter(attention=4 * 3)
    assert found.without == Counter(sort=4)


@pytest.mark.parametrize(
    ("old", "new", "turns"),
    [
        ("direction=GE", "direction=GT", 3),
        ("direction=GE", "direction=NE", 3),
        ("%one.6 = s32[] constant(1)", "%one.6 = s32[] constant(-2)", 7),
        ("%down.4 = s32[] constant(-1)", "%down.4 = s32[] constant(-3)", 2),
        ("add(%counter.4, %down.4)", "add(%counter.4, %other.4)", 0),  # 4 at once, away from the bound
    ],
)
def test_counters_bounds_and_steps(old, new, turns):
    assert PROGRAM.count(old) == 1
    program = PROGRAM.replace(old, new)
    if turns:
        assert estimate(program).kernels == Counter(attention=3 * turns)
    else:
        with pytest.raises(ValueError, match="outer_body turns as often as the data say"):
            estimate(program)


def test_a_bound_that_the_data_make_is_given():
    program = PROGRAM.replace("%bound = s32[] constant(5)", "%bound = s32[] parameter(2)")
    with pytest.raises(ValueError, match=r"inner_body turns as often as the data say: pass turns"):
        estimate(program)
    assert estimate(program, turns=7).cycles == 4 * (100 + 7 * 10) + 30_000


def test_a_bound_that_a_loop_changes_is_not_taken_for_a_number():
    program = PROGRAM.replace("tuple(%next.4, %sorted.4, %bound.4,", "tuple(%next.4, %sorted.4, %next.4,")
    with pytest.raises(ValueError, match="inner_body"):
        estimate(program)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="libtpu is not installed")
def test_a_loop_of_products_takes_what_the_chip_computes():
    code = """
import jax, jax.numpy as jnp
from benchmarks import aot
from benchmarks.estimated_cycles import estimate
place = jax.sharding.SingleDeviceSharding(aot.devices("v5e:1x1")[0])
x = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16, sharding=place)
f = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0])
for turns in (12, 24):
    w = jax.ShapeDtypeStruct((turns, 2048, 2048), jnp.bfloat16, sharding=place)
    compiled, text = aot.compiled_with_text(f.trace(x, w).lower(lowering_platforms=("tpu",)))
    assert estimate(text) == estimate(compiled.as_text())
    print(estimate(text).cycles)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=aot.child_environment("v5e:1x1"), capture_output=True, text=True, check=True
    )
    twelve, more = map(int, done.stdout.split())
    at_peak = 12 * 2 * 2048**3 / (4 * 2 * 128**2)
    assert at_peak < more - twelve < 2 * at_peak  # each turn also slices its matrix
    assert more - twelve <= twelve < 1.1 * (more - twelve)
