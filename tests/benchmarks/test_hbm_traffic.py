"""What a compiled program moves, counted in programs whose traffic is known."""

import subprocess
import sys

import pytest

from benchmarks import aot
from benchmarks.hbm_traffic import moved_bytes

PROGRAM = """
%same (param_0.0: s8[64,32]) -> s8[64,32] {
  %param_0.0 = s8[64,32]{1,0} parameter(0)
  ROOT %copy.0 = s8[64,32]{1,0} copy(%param_0.0)
}

%inner (param_0.4: bf16[128,8,32], param_1.4: s32[]) -> bf16[8,32] {
  %param_0.4 = bf16[128,8,32]{2,1,0} parameter(0)
  %param_1.4 = s32[] parameter(1)
  %zero.4 = s32[] constant(0)
  %matrix.4 = bf16[1,8,32]{2,1,0} dynamic-slice(%param_0.4, %param_1.4, %zero.4), dynamic_slice_sizes={1,8,32}
  ROOT %flat.4 = bf16[8,32]{1,0} bitcast(%matrix.4)
}

%outer (param_0.5: s32[], param_1.5: bf16[128,8,32]) -> f32[8,32] {
  %param_0.5 = s32[] parameter(0)
  %param_1.5 = bf16[128,8,32]{2,1,0} parameter(1)
  %one.5 = bf16[8,32]{1,0} fusion(%param_1.5, %param_0.5), kind=kLoop, calls=%inner
  ROOT %wide.5 = f32[8,32]{1,0} convert(%one.5)
}

%part (param_0.1: s8[64,32], param_1.1: s32[]) -> f32[1,32] {
  %param_0.1 = s8[64,32]{1,0} parameter(0)
  %again.1 = s8[64,32]{1,0} fusion(%param_0.1), kind=kLoop, calls=%same
  %param_1.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %row.1 = s8[1,32]{1,0} dynamic-slice(%again.1, %param_1.1, %zero.1), dynamic_slice_sizes={1,32}
  ROOT %wide.1 = f32[1,32]{1,0} convert(%row.1)
}

%whole (param_0.2: s4[64,32]) -> bf16[64,32] {
  %param_0.2 = s4[64,32]{1,0} parameter(0)
  ROOT %wide.2 = bf16[64,32]{1,0} convert(%param_0.2)
}

ENTRY %main (a: s8[64,32], i: s32[], b: s4[64,32], c: bf16[16,16], d: bf16[128,8,32]) -> (f32[1,32], bf16[64,32]) {
  %a = s8[64,32]{1,0} parameter(0)
  %i = s32[]{:S(1)} parameter(1)
  %b = s4[64,32]{1,0} parameter(2)
  %c = bf16[16,16]{1,0} parameter(3)
  %d = bf16[128,8,32]{2,1,0} parameter(4)
  %expert = f32[8,32]{1,0:S(1)} fusion(%i, %d), kind=kOutput, calls=%outer
  %fetch = (bf16[16,16]{1,0:S(1)}, bf16[16,16]{1,0}, u32[]{:S(2)}) copy-start(%c)
  %fetched = bf16[16,16]{1,0:S(1)} copy-done(%fetch)
  %row = f32[1,32]{1,0:S(1)} fusion(%a, %i), kind=kLoop, calls=%part
  %all = bf16[64,32]{1,0} fusion(%b), kind=kLoop, calls=%whole
  ROOT %out = (f32[1,32]{1,0:S(1)}, bf16[64,32]{1,0}) tuple(%row, %all)
}
"""


def test_main_memory_alone_counts_and_a_slice_as_its_own_size():
    fetched, row, codes, written = 2 * 16 * 16, 32, 64 * 32 // 2, 2 * 64 * 32
    expert = 2 * 8 * 32  # a slice in a fusion inside of a fusion
    assert moved_bytes(PROGRAM) == fetched + row + codes + written + expert


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="libtpu is not installed")
def test_a_product_reads_its_operands_once():
    code = """
import jax, jax.numpy as jnp
from benchmarks import aot
from benchmarks.hbm_traffic import moved_bytes
place = jax.sharding.SingleDeviceSharding(aot.devices("v5e:1x1")[0])
x = jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16, sharding=place)
w = jax.ShapeDtypeStruct((1024, 2048), jnp.int8, sharding=place)
f = jax.jit(lambda x, w: x @ w.astype(x.dtype))
print(moved_bytes(f.trace(x, w).lower().compile().as_text()))
"""
    environment = aot.child_environment("v5e:1x1")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    least = 1024 * 2048 + 2 * 8 * (1024 + 2048)
    assert least <= int(done.stdout.split()[-1]) <= 1.02 * least
