"""Bytes of a decode step whose cache is in codes, over those of bfloat16 slots, as compiled for a TPU and a GPU.

    python -m benchmarks.kernels.coded_traffic  # --slots cq compiles one codec anew, and leaves the other rows

A layer that keeps everything (`Full`), 8 streams, 8 key heads of 128 channels and 32 of queries, 8,192 slots. `MB a
step` is what one token's attention moves: on TPUs what the program's text moves to and from main memory
(`benchmarks.hbm_traffic`), on GPUs the program's arguments and twice its temporaries. Where XLA reads the codes, it
does so in a loop over blocks of slots: its body counts as often as there are blocks, and on GPUs so do temporaries.
`copied` are the temporaries of the step with the new token stored, over the bfloat16 slots: where a kernel reads the
codes, no array of slots is among them; with `cq` a GPU writes a new token's distances to all entries. `stored` is what
the codes and all that belongs to them take, over the same. `presets`: which caches have these codes. Important
tokens of `mikv`, `zipcache`, `zipvl` and `vidkv`, 384 or so, lie in a tier that XLA reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from benchmarks import aot
from benchmarks.hbm_traffic import moved_bytes
from benchmarks.reporting import RESULTS, report
from pallas_kernels.api import platforms
from pallas_kernels.partial import Partial
from streamjax.kv.codecs.block_floats import BlockFloats
from streamjax.kv.codecs.codec import Codec
from streamjax.kv.codecs.fireq import FireQ
from streamjax.kv.codecs.fp8 import FP8
from streamjax.kv.codecs.gear import Gear
from streamjax.kv.codecs.integers import Int
from streamjax.kv.codecs.measured.coupled import CQ, Codebooks
from streamjax.kv.codecs.mixed import Mixed
from streamjax.kv.query import CODED_SLOT_BLOCK, KVSpec, KVTokens, Query
from streamjax.kv.tiers.full import Full
from streamjax.models.config import RopeConfig
from streamjax.models.rope import make_rotary

CHIPS = {"v5e": "v5e:1x1", "H100": "h100", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
SHOWN = ("v5e", "H100")
STREAMS, HEADS, GROUP, WIDTH, SLOTS = 8, 8, 4, 128, 8192
COUPLED = 4  # channels that share a code of `CQ`
CODECS: dict[str, Codec | None] = {
    "bfloat16": None,
    "fp8": FP8(),
    "int8": Int(8),
    "int4": Int(4),
    "int4, keys by token": Int(4, keys="token"),
    "kivi": Int(2, group=32, residual=128),
    "fireq": FireQ(4),
    "k_sort": BlockFloats(4),
    "gear": Gear(2),
    "vidkv": Mixed(32),
    "cq": CQ(COUPLED, 8),
}
PRESETS = {
    "int8": "staircase", "int4": "comet, staircase",
    **{name: name for name in ("kivi", "fireq", "k_sort", "gear", "vidkv", "cq")},
}  # fmt: skip


def codec_of(name: str) -> Codec | None:
    """The codec, with codebooks where it reads them; what is in these does not matter here."""
    codec = CODECS[name]
    if isinstance(codec, CQ):
        entries = np.random.default_rng(0).standard_normal((HEADS * WIDTH // COUPLED << codec.bits, COUPLED))
        both = entries.astype(np.float32).tobytes()
        codec = dataclasses.replace(codec, codebooks=Codebooks(both, both, COUPLED, "any"))
    return codec


def step_bytes(chip: str, name: str) -> dict[str, float]:
    """What one step moves and copies; for a process of `aot.child_environment`."""
    platforms.platform_implementation = lambda: "triton" if chip == "H100" else "tpu"  # JAX runs on a CPU here
    tier = Full(SLOTS, codec=codec_of(name))
    place = jax.sharding.SingleDeviceSharding(aot.devices(CHIPS[chip])[0])
    spec = KVSpec(STREAMS, HEADS, WIDTH, jnp.dtype(jnp.bfloat16), GROUP)

    rotary = make_rotary(RopeConfig(), WIDTH, SLOTS)

    def read(state: Any, q: Array, position: Array) -> Partial:
        query = Query(q, q, position, position[:, 0].astype(jnp.int32), None, rotary, 1.0, None)
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
    memory, text = reads.memory_analysis(), reads.as_text()
    kernel = "decode_attention" in text
    turns = 1 if kernel else SLOTS // CODED_SLOT_BLOCK
    moved = memory.argument_size_in_bytes + 2 * turns * memory.temp_size_in_bytes
    if chip != "H100":
        moved = moved_bytes(text, turns)
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((held.k, held.v)))
    copied = whole.memory_analysis().temp_size_in_bytes
    return {"moved": moved, "copied": copied, "stored": stored, "kernel": kernel}


def compiled(chip: str, name: str) -> dict[str, float]:
    """`step_bytes` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kernels.coded_traffic", "--child", chip, name]
    environment = aot.child_environment(CHIPS[chip])
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=aot.ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _beside(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """These rows, and those of a file that are of other chips or codecs, in order."""
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    found = {(row["chip"], row["slots"]): row for row in (*before, *rows)}
    order = [(chip, name) for chip in CHIPS for name in CODECS if (chip, name) in found]
    return [found[key] | {"presets": PRESETS.get(key[1], "")} for key in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=list(SHOWN), choices=CHIPS)
    parser.add_argument("--slots", nargs="+", default=list(CODECS), choices=CODECS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(step_bytes(*arguments.child)))
        return
    rows: list[dict[str, Any]] = []
    for chip in arguments.chips:
        exact = 0.0
        for name in ["bfloat16", *(x for x in arguments.slots if x != "bfloat16")]:
            found = compiled(chip, name)
            exact = exact or found["moved"]
            slots = 4 * STREAMS * HEADS * WIDTH * SLOTS
            row = {"chip": chip, "slots": name, "read by": "kernel" if found["kernel"] else "XLA"}
            row |= {"MB a step": found["moved"] / 1e6, "x bfloat16": found["moved"] / exact}
            rows.append(row | {name: found[name] / slots for name in ("stored", "copied")})
            print(rows[-1], flush=True)
    rows = _beside(rows, arguments.output or RESULTS / "kernels" / "coded_traffic.json")
    report("kernels/coded_traffic", rows, arguments.output, streams=STREAMS, cached=SLOTS)


if __name__ == "__main__":
    main()
