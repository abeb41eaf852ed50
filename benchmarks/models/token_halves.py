"""Sums over the tensor axis beside computation: what the TPU compiler hides by itself, and with a batch in two halves.

    python -m benchmarks.models.token_halves                        # all cases
    python -m benchmarks.models.token_halves --cases decode-64
    python -m benchmarks.models.token_halves --page                 # compile nothing, write docs/sharding.md

TokenWeave (2505.11329) cuts a batch in two, so that one half is computed while the other is summed over devices. Here
two layers of Llama-3.1-8B, bfloat16, are compiled ahead of time for eight chips of v5e along `tensor`, as one batch
and as two halves in one program, which depend on each other in nothing; `apart`, the second half's weights stand
behind a barrier, since the compiler joins products with the same weights again. `async` is how many of the all-reduces
the scheduled program begins and ends apart, `covered` those with a product between the two. `read` is what a step moves
to and from main memory (`benchmarks.hbm_traffic`), in MB. `sums` is what a chip receives by the all-reduces, in MB.
`sums, ms` and `products, ms` are what both take by the chip's data sheet, at the speed of its links and at its peak.
`options` are the compiler's: "async" asks for asynchronous all-reduces and their fusion with what is beside them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import streamjax as sj
from benchmarks import aot, tables
from benchmarks.hbm_traffic import moved_bytes
from benchmarks.model_shapes import SHAPES
from benchmarks.models import aot_cases
from benchmarks.models.context_on_tpu import overlaps, received
from benchmarks.reporting import RESULTS, table
from pallas_kernels.api import platforms
from streamjax.parallel.mesh import with_placement
from streamjax.parallel.rules import partition_spec
from streamjax.streaming.step import step
from streamjax.training.mesh_choice.chips import chip_of

PAGE = Path(__file__).parents[2] / "docs" / "sharding.md"
OUTPUT = RESULTS / "models" / "token_halves.json"
TOPOLOGY, LAYERS = "v5e:2x4", 2
CHIP = chip_of("TPU v5e")
CACHE = sj.kv.preset("streaming_llm", sinks=4, window=4092)
ASYNC = {
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of `rows` streams, each with `width` tokens; in `parts` that depend on each other in nothing.

    apart: the compiler may not see that they have the same weights. overlap: with the options `ASYNC`.
    """

    rows: int
    width: int
    parts: int = 1
    apart: bool = False
    overlap: bool = False


CASES = {
    "decode-64": Case(64, 1),
    "decode-64-async": Case(64, 1, overlap=True),
    "decode-64-halves-async": Case(64, 1, 2, overlap=True),
    "decode-64-apart-async": Case(64, 1, 2, True, True),
    "prefill-8x512": Case(8, 512),
    "prefill-8x512-async": Case(8, 512, overlap=True),
    "prefill-8x512-halves": Case(8, 512, 2),
    "prefill-8x512-halves-async": Case(8, 512, 2, overlap=True),
    "prefill-8x512-apart": Case(8, 512, 2, True),
    "prefill-8x512-apart-async": Case(8, 512, 2, True, True),
}


def compile_case(case: Case) -> None:
    """Compile one case, in a process of `aot.child_environment`; bytes on one chip."""
    platforms.platform_implementation = lambda: "tpu"  # JAX runs on a CPU here
    mesh, config = aot.tpu_mesh(TOPOLOGY, tensor=8), SHAPES["llama-3.1-8b"].replace(num_layers=LAYERS)
    rows = case.rows // case.parts

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        spec = partition_spec(("batch", None)[: len(shape)], shape, mesh)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))

    def halves(model: sj.Decoder, parts: list[tuple[Any, Any, Any]]) -> list[Any]:
        models = [model, *(jax.lax.optimization_barrier(model) if case.apart else model for _ in parts[1:])]
        return [step(model, *part) for model, part in zip(models, parts, strict=True)]

    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: sj.Decoder(config, jax.random.key(0), dtype=jnp.bfloat16))
        state = jax.eval_shape(lambda model: sj.init_state(model, CACHE, rows), model)
        model, state = with_placement(model, mesh), with_placement(state, mesh)
        parts = [(state, integers(rows, case.width), integers(rows)) for _ in range(case.parts)]
        options = ASYNC if case.overlap else {}
        lowered = jax.jit(halves, donate_argnums=1).trace(model, parts).lower()
        print("{}", flush=True)
        aot.compile_until_assigned(lowered, options)


def read_case(_: dict[str, Any], text: str, memory: dict[str, int]) -> dict[str, Any]:
    """Figures of a case."""
    return {"memory": memory, "moved": moved_bytes(text), "collectives": received(text), **overlaps(text, "all-reduce")}


def row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    case = CASES[name]
    config = SHAPES["llama-3.1-8b"].replace(num_layers=LAYERS)
    layers = config.parameter_count - 2 * config.vocab_size * config.d_model
    products = 2.0 * (layers * case.width + config.vocab_size * config.d_model) * case.rows / 8
    sums = figures["collectives"].get("all-reduce", {"bytes": 0})["bytes"]
    return {
        "step": f"{case.rows} x {case.width} tokens",
        "in": ("halves, apart" if case.apart else "halves") if case.parts > 1 else "one batch",
        "options": "async" if case.overlap else "default",
        "all-reduces": str(figures["all"]),
        "async": str(figures["async"]),
        "covered": str(figures["covered"]),
        "sums": f"{sums / 1e6:.1f}",
        "sums, ms": f"{1e3 * 2 * 7 / 8 * sums / CHIP.bandwidth(8, 1, 8):.2f}",
        "products, ms": f"{1e3 * products / CHIP.flops:.2f}",
        "read": f"{figures['moved'] / 1e6:,.0f}",
    }


def write_page(found: dict[str, dict[str, Any]]) -> None:
    """The table of docs/sharding.md."""
    tables.put(PAGE, "models/token_halves", table([row(name, found[name]) for name in CASES if name in found]))


def environment(_: str) -> dict[str, str]:
    """Of a case's process."""
    return aot.child_environment(TOPOLOGY)


def main() -> None:
    aot_cases.run(
        "benchmarks.models.token_halves",
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
