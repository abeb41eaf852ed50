"""What one layer moves on a TPU where rows decode and a chunk of a prompt is read: apart, and in one program.

    python -m benchmarks.serving.fused_on_tpu              # some 3 minutes on 2 cores
    python -m benchmarks.serving.fused_on_tpu --chips v5e --rows 8 --chunks 256

Compiled ahead of time, in bfloat16, over 4 sinks and a window of 4,092 tokens: MB that the program's text moves to and
from main memory (`benchmarks.hbm_traffic`). `weights` are the layer's, `decode` reads a token of each row, `read` a
chunk of one more stream, `fused` both (`serving/fused.py`); `saved` is what that is less than the two, in weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

import streamjax as sj
from benchmarks import aot
from benchmarks.hbm_traffic import moved_bytes, updated_in_place
from benchmarks.model_shapes import SHAPES
from benchmarks.reporting import Record
from pallas_kernels.api import platforms
from streamjax.parallel.mesh import with_placement
from streamjax.serving.fused import layer_over_both
from streamjax.streaming.by_layer.in_turn import Places
from streamjax.streaming.by_layer.layerwise import layer_over

CACHE = sj.kv.preset("streaming_llm", sinks=4, window=4092)
MODELS, CHIPS = ("llama-3.1-8b", "qwen2.5-0.5b"), ("v5e", "v6e")
PROGRAMS = ("decode", "read", "fused")
MODULE = "benchmarks.serving.fused_on_tpu"


def compile_program(program: str, name: str, chip: str, rows: int, chunk: int) -> None:
    """Compile one program as far as its buffers, in a process of `aot.child_environment`; prints the layer's bytes."""
    platforms.platform_implementation = lambda: "tpu"  # JAX runs on a CPU here
    mesh, config = aot.tpu_mesh(f"{chip}:1x1"), SHAPES[name].replace(num_layers=1)

    def given(streams: int, width: int) -> tuple[Any, Any, Places]:
        state = jax.eval_shape(lambda: sj.init_state(model, CACHE, streams, dtype=jnp.bfloat16))
        shape = (1, streams, width)
        position, valid = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.uint32, jnp.bool))
        places = Places(position, valid, jax.ShapeDtypeStruct(shape[:2], jnp.int32), None)
        return state, jax.ShapeDtypeStruct((*shape, config.d_model), jnp.bfloat16), places

    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: sj.Decoder(config, jax.random.key(0), dtype=jnp.bfloat16))
        one, other = given(rows, 1), given(1, chunk)
        model, one, other = (with_placement(tree, mesh) for tree in (model, one, other))
        block, cache, span = model.layer(0), one[0].caches[0], one[0].span
        print(json.dumps({"weights": aot.bytes_per_device(block)}), flush=True)
        if program == "fused":
            (few, few_x, few_places), (state, x, places) = one, other
            lowered = layer_over_both.lower(
                block, None, few_x, few.layers[0], few_places, x, state.layers[0], places, (cache, cache), (span, span),
                None, None,
            )  # fmt: skip
        else:
            state, x, places = one if program == "decode" else other
            lowered = layer_over.lower(block, None, x, state.layers[0], places, cache, span, None)
        aot.compile_until_assigned(lowered)


def figures(name: str, chip: str, rows: int, chunk: int) -> dict[str, float]:
    """MB that each program moves, and those of the layer's weights."""
    found: dict[str, float] = {}
    for program in PROGRAMS:
        child = [sys.executable, "-m", MODULE, "--child", program, name, chip, str(rows), str(chunk)]
        ended = aot.end_when_assigned(child, aot.child_environment(f"{chip}:1x1"))
        if ended.found is None:
            raise SystemExit(f"{name}, {program}: {ended.errors.strip().splitlines()[-1]}")
        found["weights"] = json.loads(ended.printed[-1])["weights"] / 1e6
        text, _ = ended.found
        found[program] = (moved_bytes(text) - updated_in_place(text)) / 1e6
    apart = found["decode"] + found["read"]
    return {**found, "fused / apart": found["fused"] / apart, "saved": (apart - found["fused"]) / found["weights"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=MODELS)
    parser.add_argument("--chips", nargs="+", default=CHIPS)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--chunks", type=int, nargs="+", default=[256])
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        program, name, chip, rows, chunk = arguments.child
        compile_program(program, name, chip, int(rows), int(chunk))
        return
    record = Record("serving/fused_on_tpu")
    for name in arguments.models:
        for chip in arguments.chips:
            for rows in arguments.rows:
                for chunk in arguments.chunks:
                    key: dict[str, Any] = {"model": name, "chip": chip, "streams": rows, "chunk": chunk}
                    if not record.has(**key):
                        record.add({**key, **figures(name, chip, rows, chunk)})
    record.finish()


if __name__ == "__main__":
    main()
