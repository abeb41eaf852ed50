"""Sums over the tensor axis beside computation: what the TPU compiler hides by itself, and with a batch in two halves.

    python -m benchmarks.models.token_halves                        # all cases
    python -m benchmarks.models.token_halves --cases decode-64
    python -m benchmarks.models.token_halves --page                 # compile nothing, write docs/sharding.md

TokenWeave (2505.11329) cuts a batch in two, so that one half is computed while the other is summed over devices. Here
two layers of Llama-3.1-8B, bfloat16, are compiled ahead of time for eight chips of v5e along `tensor`, as one batch
and as two halves in one program, which depend on each other in nothing. `async` is how many of the all-reduces the
scheduled program begins and ends apart, `covered` those with a product between the two. `read` is what a step moves to
and from main memory (`benchmarks.hbm_traffic`), in MB. `sums` is what a chip receives by the all-reduces, in MB.
`options` are the compiler's: "async" asks for asynchronous all-reduces and their fusion with what is beside them.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
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
from benchmarks.models.context_on_tpu import received
from benchmarks.reporting import RESULTS, table
from pallas_kernels.api import platforms
from streamjax.parallel.mesh import with_placement
from streamjax.parallel.rules import partition_spec
from streamjax.streaming.step import step

PAGE = Path(__file__).parents[2] / "docs" / "sharding.md"
OUTPUT = RESULTS / "models" / "token_halves.json"
TOPOLOGY, LAYERS = "v5e:2x4", 2
CACHE = sj.kv.preset("streaming_llm", sinks=4, window=4092)
ASYNC = {
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of `rows` streams, each with `width` tokens; in `parts` that depend on each other in nothing."""

    rows: int
    width: int
    parts: int = 1
    overlap: bool = False


CASES = {
    "decode-64": Case(64, 1),
    "decode-64-async": Case(64, 1, overlap=True),
    "decode-64-halves-async": Case(64, 1, 2, True),
    "prefill-8x512": Case(8, 512),
    "prefill-8x512-async": Case(8, 512, overlap=True),
    "prefill-8x512-halves": Case(8, 512, 2),
    "prefill-8x512-halves-async": Case(8, 512, 2, True),
}


def compile_case(case: Case) -> dict[str, Any]:
    """Compile one case, in a process of `aot.child_environment`; bytes on one chip."""
    platforms.platform_implementation = lambda: "tpu"  # JAX runs on a CPU here
    mesh, config = aot.tpu_mesh(TOPOLOGY, tensor=8), SHAPES["llama-3.1-8b"].replace(num_layers=LAYERS)
    rows = case.rows // case.parts

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        spec = partition_spec(("batch", None)[: len(shape)], shape, mesh)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))

    def halves(model: sj.Decoder, parts: list[tuple[Any, Any, Any]]) -> list[Any]:
        return [step(model, *part) for part in parts]

    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: sj.Decoder(config, jax.random.key(0), dtype=jnp.bfloat16))
        state = jax.eval_shape(lambda model: sj.init_state(model, CACHE, rows), model)
        model, state = with_placement(model, mesh), with_placement(state, mesh)
        parts = [(state, integers(rows, case.width), integers(rows)) for _ in range(case.parts)]
        start = time.process_time()
        lowered = jax.jit(halves, donate_argnums=1).trace(model, parts).lower()
        compiled = lowered.compile(compiler_options=ASYNC if case.overlap else {})
    memory = compiled.memory_analysis()
    folder = Path(os.environ["LIBTPU_INIT_ARGS"].split()[0].partition("=")[2])
    text = max(folder.glob("*-TLP-hlo.txt"), key=lambda path: path.stat().st_size).read_text()
    if keep := os.environ.get("KEEP_HLO"):
        Path(keep).write_text(text)
    return {
        "temp": memory.temp_size_in_bytes,
        "moved": moved_bytes(text),
        "collectives": received(text),
        **overlaps(text),
        "compile_cpu_s": time.process_time() - start,
    }


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", flags=re.M | re.S)
_STARTS = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? all-reduce-start\(", flags=re.M)


def overlaps(text: str) -> dict[str, int]:
    """All-reduces of a scheduled program: how many there are, how many begin and end apart, and how many of those have
    a product, or a kernel, between."""
    bodies = dict(_COMPUTATION.findall(text))
    with_product = {name for name, body in bodies.items() if re.search(r" (convolution|dot)\(", body)}
    sync = begun = covered = 0
    for body in bodies.values():
        lines = body.splitlines()
        sync += sum(" all-reduce(" in line for line in lines)
        for place, line in enumerate(lines):
            if not (start := _STARTS.match(line)):
                continue
            begun += 1
            ends = re.compile(rf"all-reduce-done\(.*%?{re.escape(start[1])}\b")
            for after in lines[place + 1 :]:
                if ends.search(after):
                    break
                called = re.search(r"calls=%?([\w.\-]+)", after)
                if " convolution(" in after or "tpu_custom_call" in after or (called and called[1] in with_product):
                    covered += 1
                    break
    return {"all_reduces": sync + begun, "async": begun, "covered": covered}


def row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    case = CASES[name]
    sums = figures["collectives"].get("all-reduce", {"bytes": 0})["bytes"]
    return {
        "step": f"{case.rows} x {case.width} tokens",
        "in": "two halves" if case.parts > 1 else "one batch",
        "options": "async" if case.overlap else "default",
        "all-reduces": str(figures["all_reduces"]),
        "async": str(figures["async"]),
        "covered": str(figures["covered"]),
        "sums": f"{sums / 1e6:.1f}",
        "read": f"{figures['moved'] / 1e6:,.0f}",
        "temp": f"{figures['temp'] / 1e6:,.0f}",
    }


def write_page(found: dict[str, dict[str, Any]]) -> None:
    """The table of docs/sharding.md."""
    tables.put(PAGE, "models/token_halves", table([row(name, found[name]) for name in CASES if name in found]))


def environment(_: str, folder: str) -> dict[str, str]:
    """Of a case's process: the compiler writes the scheduled program into the folder."""
    found = aot.child_environment(TOPOLOGY)
    found["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=false"
    return found


def main() -> None:
    aot_cases.run(
        "benchmarks.models.token_halves",
        __doc__,
        CASES,
        OUTPUT,
        compile_case=compile_case,
        write_page=write_page,
        environment=environment,
    )


if __name__ == "__main__":
    main()
