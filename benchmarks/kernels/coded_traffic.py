"""Bytes of a decode step whose cache is in codes, over those of bfloat16 slots, as compiled for a TPU and a GPU.

    python -m benchmarks.kernels.coded_traffic

A layer that keeps everything (`Full`), 8 streams, 8 key heads of 128 channels and 32 of queries, 8,192 slots. `MB a
step` is what one token's attention moves: on TPUs what the program's text moves to and from main memory
(`benchmarks.hbm_traffic`), on GPUs the program's arguments and twice its temporaries. `copied` are the temporaries of
the step with the new token stored, over the bfloat16 slots: no array of slots is among them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from benchmarks import aot
from benchmarks.hbm_traffic import moved_bytes
from benchmarks.reporting import report
from pallas_kernels.api import platforms
from pallas_kernels.partial import Partial
from streamjax.kv.codecs.codec import Codec
from streamjax.kv.codecs.integers import Int
from streamjax.kv.tier import KVSpec, KVTokens, Query
from streamjax.kv.tiers.full import Full

CHIPS = {"v5e": "v5e:1x1", "H100": "h100"}
STREAMS, HEADS, GROUP, WIDTH, SLOTS = 8, 8, 4, 128, 8192
CODECS: dict[str, Codec | None] = {
    "bfloat16": None,
    "int8": Int(8),
    "int4": Int(4),
    "int2, groups of 32": Int(2, group=32),
}


def step_bytes(chip: str, name: str) -> dict[str, float]:
    """What one step moves and copies; for a process of `aot.child_environment`."""
    platforms.platform_implementation = lambda: "triton" if chip == "H100" else "tpu"  # JAX runs on a CPU here
    tier = Full(SLOTS, codec=CODECS[name])
    place = jax.sharding.SingleDeviceSharding(aot.devices(CHIPS[chip])[0])
    spec = KVSpec(STREAMS, HEADS, WIDTH, jnp.dtype(jnp.bfloat16), GROUP)

    def read(state: Any, q: Array, position: Array) -> Partial:
        query = Query(q, q, position, position[:, 0].astype(jnp.int32), None, None, 1.0, None)
        return tier.attend(state, query, None)

    def step(state: Any, q: Array, position: Array, k: Array) -> tuple[Any, Partial]:
        tokens = KVTokens(k, k, k, position[:, None], jnp.ones((STREAMS, 1, 1), bool))
        return tier.store(state, tokens), read(state, q, position)

    def array(*shape: int, dtype: DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    held = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), jax.eval_shape(lambda: tier.init(spec)))
    shapes = held, array(STREAMS, 1, HEADS * GROUP, WIDTH), array(STREAMS, 1, dtype=jnp.uint32)
    reads = jax.jit(read).trace(*shapes).lower().compile()
    whole = jax.jit(step, donate_argnums=0).trace(*shapes, array(STREAMS, HEADS, 1, WIDTH)).lower().compile()
    memory = reads.memory_analysis()
    moved = memory.argument_size_in_bytes + 2 * memory.temp_size_in_bytes
    if chip != "H100":
        moved = moved_bytes(reads.as_text())
    return {"moved": moved, "copied": whole.memory_analysis().temp_size_in_bytes}


def compiled(chip: str, name: str) -> dict[str, float]:
    """`step_bytes` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kernels.coded_traffic", "--child", chip, name]
    environment = aot.child_environment(CHIPS[chip])
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=aot.ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(step_bytes(*arguments.child)))
        return
    rows = []
    for chip in arguments.chips:
        exact = 0.0
        for name in CODECS:
            found = compiled(chip, name)
            exact = exact or found["moved"]
            row = {"chip": chip, "slots": name, "MB a step": found["moved"] / 1e6, "x bfloat16": found["moved"] / exact}
            rows.append(row | {"copied": found["copied"] / (4 * STREAMS * HEADS * WIDTH * SLOTS)})
            print(rows[-1], flush=True)
    report("kernels/coded_traffic", rows, arguments.output, streams=STREAMS, cached=SLOTS)


if __name__ == "__main__":
    main()
