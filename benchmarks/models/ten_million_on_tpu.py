"""Llama-3.1-8B with ten million tokens of context on 256 chips of v5p, compiled ahead of time.

    python -m benchmarks.models.ten_million_on_tpu                  # all cases
    python -m benchmarks.models.ten_million_on_tpu --page           # compile nothing, write docs/sharding.md

Keys and values of one stream lie over the mesh axis `context`, each chip's part in its own memory, as in Mnemosyne
(2409.17264): every chip attends to its own slots, and a layer exchanges partial sums alone. Four of the 32 layers are
compiled; what chips hold is counted from the shapes of all 32, and what four layers move is scaled to them. `floor` is
what a step must read of a chip's memory: weights and slots, once each; `beside` what the compiler needs beside both (in
the program of four layers); `moved` what the program's text moves
(`benchmarks.hbm_traffic`). `exchanged` is what a chip receives in a step.

The second table is of a prompt read beside streams that decode: the largest chunk whose step stays within 50 ms at half
of a v5p's peak, by the operations of `chunk_seconds`. The longer the context, the smaller the chunk.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import streamjax as sj
from benchmarks import aot, tables
from benchmarks.hbm_traffic import moved_bytes, updated_in_place
from benchmarks.model_shapes import SHAPES
from benchmarks.models import aot_cases
from benchmarks.models.context_on_tpu import received
from benchmarks.reporting import RESULTS, table
from pallas_kernels.api import platforms
from streamjax.parallel.mesh import with_placement
from streamjax.parallel.rules import partition_spec
from streamjax.streaming.step import step
from streamjax.training.mesh_choice.chips import chip_of

PAGE = Path(__file__).parents[2] / "docs" / "sharding.md"
OUTPUT = RESULTS / "models" / "ten_million_on_tpu.json"
TOPOLOGY, CONTEXT, FEW = "v5p:4x8x8", 10 * 2**20, 4
MODEL = SHAPES["llama-3.1-8b"]
CHIP = chip_of("TPU v5p")
SECONDS = 0.05  # of a step that reads a chunk: what streams beside it wait for
EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of `rows` streams that reads `width` tokens of each."""

    mesh: tuple[tuple[str, int], ...]
    rows: int = 1
    width: int = 1


_WIDE, _SQUARE = (("context", 32), ("tensor", 8)), (("context", 64), ("tensor", 4))
CASES = {
    "decode": Case(_WIDE),
    "decode-16": Case(_WIDE, 16),
    "decode-context64": Case(_SQUARE),
    "chunk-512": Case(_WIDE, 1, 512),
    "chunk-2048": Case(_WIDE, 1, 2048),
}


def compile_case(case: Case) -> None:
    """Compile one case, in a process of `aot.child_environment`; bytes on one chip."""
    platforms.platform_implementation = lambda: "tpu"  # JAX runs on a CPU here
    mesh, cache = aot.tpu_mesh(TOPOLOGY, **dict(case.mesh)), sj.kv.preset("dense", capacity=CONTEXT)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        spec = partition_spec(("batch", None)[: len(shape)], shape, mesh)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))

    def placed(layers: int) -> tuple[sj.Decoder, Any]:
        config = MODEL.replace(num_layers=layers)
        model = jax.eval_shape(lambda: sj.Decoder(config, jax.random.key(0), dtype=jnp.bfloat16))
        state = jax.eval_shape(lambda model: sj.init_state(model, cache, case.rows), model)
        return with_placement(model, mesh), with_placement(state, mesh)

    def of_layers(model: sj.Decoder, state: Any) -> int:
        return aot.bytes_per_device((model.layers, state))

    with jax.set_mesh(mesh):
        model, state = placed(FEW)
        lowered = step.trace(model, state, integers(case.rows, case.width), integers(case.rows)).lower()
        whole, whole_state = placed(MODEL.num_layers)
        known = {
            "weights": aot.bytes_per_device(whole),
            "slots": aot.bytes_per_device(whole_state),
            "floor": of_layers(whole, whole_state) + aot.bytes_per_device(whole.head),
            "few": aot.bytes_per_device((model, state)),
            "ends_floor": aot.bytes_per_device(model.head),
        }
        print(json.dumps(known), flush=True)
        aot.compile_until_assigned(lowered)


def read_case(printed: dict[str, Any], text: str, memory: dict[str, int]) -> dict[str, Any]:
    """Figures of a case."""
    return {
        **printed,
        "memory": memory,
        "moved": moved_bytes(text) - updated_in_place(text),
        "copied": aot.copied_bytes(text),
        "kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "collectives": received(text),
    }


def row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """A line of the table, in GB and ms."""
    case, scale = CASES[name], MODEL.num_layers / FEW
    exchanged = sum(found["bytes"] for found in figures["collectives"].values())
    moved = figures["ends_floor"] + scale * (figures["moved"] - figures["ends_floor"])
    beside = figures["memory"]["default"] - figures["few"]
    return {
        "mesh": " ".join(f"{axis}={size}" for axis, size in case.mesh),
        "streams x tokens": f"{case.rows} x {case.width}",
        "weights": f"{figures['weights'] / 1e9:.2f}",
        "slots": f"{figures['slots'] / 1e9:.2f}",
        "beside": f"{beside / 1e9:.2f}",
        "of 102": f"{(figures['weights'] + figures['slots'] + beside) / 1e9:.2f}",
        "floor": f"{figures['floor'] / 1e9:.2f}",
        "moved": f"{moved / 1e9:.2f}" if case.width == 1 else "-",  # the loop over slots counts once
        "floor, ms": f"{1e3 * figures['floor'] / CHIP.memory_bandwidth:.2f}",
        "exchanged, MB": f"{scale * exchanged / 1e6:.2f}",
        "most": ", ".join(f"{kind} `{found['largest']}`" for kind, found in figures["collectives"].items()),
    }


def chunk_seconds(width: int, behind: int, context: int, tensor: int, decoding: int = 0, behind_each: int = 0) -> float:
    """Seconds of a step that reads `width` tokens behind `behind` others, with `decoding` streams beside it.

    The products of a chunk are split over tensor, and repeated along context; attention is split over both.
    """
    peak, heads = EFFICIENCY * CHIP.flops, MODEL.num_heads * MODEL.head_dim
    products = 2.0 * (MODEL.parameter_count - MODEL.vocab_size * MODEL.d_model) * (width + decoding) / tensor / peak
    pairs = width * (behind + width / 2) + decoding * behind_each
    attention = 4.0 * MODEL.num_layers * heads * pairs / (context * tensor) / peak
    slots = behind + decoding * behind_each
    read = 4.0 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * slots / (context * tensor)
    weights = 2.0 * MODEL.parameter_count / tensor
    return max(products, weights / CHIP.memory_bandwidth) + max(attention, read / CHIP.memory_bandwidth)


def chunk_row(behind: int) -> dict[str, str]:
    """The largest power of two whose step is short enough, alone and beside 16 streams of a million tokens."""

    def largest(**beside: int) -> str:
        sizes = [2**n for n in range(16) if chunk_seconds(2**n, behind, 32, 8, **beside) <= SECONDS]
        return f"{max(sizes):,}" if sizes else "-"

    return {
        "tokens behind": f"{behind:,}",
        "chunk alone": largest(),
        "beside 16 streams of 1M tokens": largest(decoding=16, behind_each=2**20),
        "a chunk of 4,096, ms": f"{1e3 * chunk_seconds(4096, behind, 32, 8):.1f}",
    }


def write_page(found: dict[str, dict[str, Any]]) -> None:
    """The tables of docs/sharding.md."""
    compiled = table([row(name, found[name]) for name in CASES if name in found])
    chunks = table([chunk_row(behind) for behind in (2**17, 2**20, 2**22, CONTEXT)])
    tables.put(PAGE, "models/ten_million_on_tpu", f"{compiled}\n\n{chunks}")


def environment(_: str) -> dict[str, str]:
    """Of a case's process."""
    return aot.child_environment(TOPOLOGY)


def main() -> None:
    aot_cases.run(
        "benchmarks.models.ten_million_on_tpu",
        __doc__,
        CASES,
        OUTPUT,
        compile_case=compile_case,
        write_page=write_page,
        environment=environment,
        read_case=read_case,
    )


if __name__ == "__main__":
    main()
