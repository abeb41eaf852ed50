"""Mixtures of experts on TPUs, compiled ahead of time: what a decode step reads, and what 64 chips say to each other.

    python -m benchmarks.models.experts_on_tpu                          # all cases; minutes on 2 cores
    python -m benchmarks.models.experts_on_tpu --cases qwen3-v5e-1 qwen3-train
    python -m benchmarks.models.experts_on_tpu --page                   # compile nothing, write docs/sharding.md

No weight is ever made: models are trees of shapes, in bfloat16, on chips that exist for the compiler only. Each case is
compiled in a process of its own.

`floor` is what a decode step must read: caches and all weights once, of experts those that the streams can choose.
`accessed` is what the program's text moves to and from main memory (`benchmarks.hbm_traffic`). There the body of a loop
counts once, one expert a layer: the other chosen ones are added. Of a cache that is updated where it lies, only the
update counts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import streamjax as sj
from benchmarks import aot, tables
from benchmarks.expert_shapes import shape
from benchmarks.hbm_traffic import moved_bytes, updated_in_place
from benchmarks.models import aot_cases
from benchmarks.reporting import RESULTS, table
from pallas_kernels.api import platforms
from streamjax.models.config import ExpertsConfig, ModelConfig
from streamjax.models.mlps import grouped_product
from streamjax.parallel.mesh import with_placement
from streamjax.parallel.rules import partition_spec
from streamjax.streaming.step import step

CACHE = sj.kv.preset("streaming_llm", sinks=4, window=4092)
PAGE = Path(__file__).parents[2] / "docs" / "sharding.md"
OUTPUT = RESULTS / "models" / "experts_on_tpu.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step of `rows` streams, or the gradient of `rows` sequences of `length` tokens."""

    model: str
    topology: str
    rows: int
    mesh: tuple[tuple[str, int], ...] = ()
    length: int = 1
    layers: int | None = None
    method: str = "remat"
    ragged: bool = False  # `ragged_dot` for few rows, too

    @property
    def trains(self) -> bool:
        return self.length > 1


_FEW = 4  # layers that are compiled of decode steps, whose layers stand one after the other
_ONE_CHIP = {
    f"{model.partition('-')[0]}-{chip}-{rows}": Case(model, f"{chip}:1x1", rows, layers=_FEW)
    for model in ("qwen3-30b-a3b", "deepseek-v2-lite")
    for chip in ("v5e", "v6e")
    for rows in (1, 8, 64)
}
_RAGGED = {
    f"{name}-ragged": dataclasses.replace(case, ragged=True)
    for name, case in _ONE_CHIP.items()
    if name in ("qwen3-v5e-1", "qwen3-v5e-64", "deepseek-v5e-1", "deepseek-v5e-64")
}
_SLICE = "v5p:4x4x4"
_QWEN, _GPT = (("data", 16), ("expert", 4)), (("data", 4), ("tensor", 4), ("expert", 4))
_POD = {
    "qwen3-decode": Case("qwen3-30b-a3b", _SLICE, 256, _QWEN, layers=_FEW),
    "gpt-decode": Case("gpt-oss-20b", _SLICE, 256, _GPT, layers=_FEW),
    "qwen3-train": Case("qwen3-30b-a3b", _SLICE, 64, (("fsdp", 16), ("expert", 4)), 4096),
    "gpt-train": Case("gpt-oss-20b", _SLICE, 64, (("fsdp", 16), ("expert", 4)), 4096),
}
CASES = _ONE_CHIP | _RAGGED | _POD


def compile_case(case: Case) -> None:
    """Compile one case, in a process of `aot.child_environment`, as far as its buffers; bytes on one chip."""
    platforms.platform_implementation = lambda: "tpu"  # JAX runs on a CPU here
    if case.ragged:
        grouped_product._FEW = 0
    mesh, config = aot.tpu_mesh(case.topology, **dict(case.mesh)), shape(case.model, case.layers)
    with jax.set_mesh(mesh):
        build = lambda: sj.Decoder(config, jax.random.key(0), dtype=jnp.bfloat16, scan_layers=case.trains)  # noqa: E731
        model = with_placement(jax.eval_shape(build), mesh)
        state = None
        if case.trains:
            traced = jax.jit(lambda model, batch: sj.training.loss_and_grad(model, batch, case.method)).trace(
                model, {name: _rows(case, mesh, dtype) for name, dtype in _BATCH.items()}
            )
        else:
            state = jax.eval_shape(lambda model: sj.init_state(model, CACHE, case.rows), model)
            state = with_placement(state, mesh)
            traced = step.trace(model, state, _rows(case, mesh), _rows(case, mesh, count=True))
        known = {"weights": aot.bytes_per_device(model), "state": 0 if state is None else aot.bytes_per_device(state)}
        print(json.dumps({**known, **_of_experts(config, case)}), flush=True)
        aot.compile_until_assigned(traced.lower())


def read_case(printed: dict[str, Any], text: str, memory: dict[str, int]) -> dict[str, Any]:
    """Figures of a case. What a step takes beside weights and caches has gradients in it, where it makes some."""
    return {
        **printed,
        "peak": memory["default"],
        "temp": memory["default"] - printed["weights"] - printed["state"],
        "moved": moved_bytes(text) - updated_in_place(text),
        "ragged": '"is_ragged_dot":true' in text,
        "collectives": collectives(text),
    }


_BATCH = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}


def _rows(case: Case, mesh: Any, dtype: Any = jnp.int32, count: bool = False) -> jax.ShapeDtypeStruct:
    dims = (case.rows,) if count else (case.rows, case.length)
    placement = NamedSharding(mesh, partition_spec(("batch", "length")[: len(dims)], dims, mesh))
    return jax.ShapeDtypeStruct(dims, dtype, sharding=placement)


def _of_experts(config: ModelConfig, case: Case) -> dict[str, int]:
    """Bytes of all experts, of those that the rows can choose, and of one a layer; and of the embedding."""
    every = chosen = layers = 0
    for block in config.blocks:
        if isinstance(block.mlp, ExpertsConfig):
            one = 2 * 3 * config.d_model * block.mlp.mlp_dim
            layers += one
            every += one * block.mlp.num_experts
            chosen += one * min(block.mlp.num_experts, case.rows * case.length * block.mlp.experts_per_token)
    embedding = 2 * config.vocab_size * config.d_model
    return {"experts": every, "chosen": chosen, "one_each": layers, "embedding": embedding}


_RESULT = re.compile(r"(\w+)\[([\d,]*)\]")
_OPERATION = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)(-start)?\("
)
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}


def collectives(text: str) -> dict[str, dict[str, Any]]:
    """Of each kind of collective in a compiled program: how many, bytes of their results, and the largest result.

    What stands in a loop, over layers for instance, counts once.
    """
    number, size, largest = Counter(), Counter(), {}
    for result, kind, begun in _OPERATION.findall(text):
        parts = _RESULT.findall(result)
        if begun and kind == "all-gather":
            parts = parts[len(parts) // 2 :]  # behind the operands
        each = {f"{t}[{dims}]": _BYTES[t] * math.prod(int(n) for n in dims.split(",") if n) for t, dims in parts}
        number[kind] += 1
        size[kind] += sum(each.values())
        top = max(each, key=lambda name: each[name])
        if each[top] > largest.get(kind, ("", -1))[1]:
            largest[kind] = (top, each[top])
    return {kind: {"count": number[kind], "bytes": size[kind], "largest": largest[kind][0]} for kind in sorted(number)}


def decode_row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """A line on one chip's decode step, in MB."""
    case = CASES[name]
    floor = figures["weights"] - figures["experts"] - figures["embedding"] + figures["chosen"] + figures["state"]
    read = figures["moved"]
    if not figures["ragged"]:
        read += figures["chosen"] - figures["one_each"]
    return {
        "model": case.model,
        "chip": case.topology,
        "streams": str(case.rows),
        "experts by": "ragged_dot" if figures["ragged"] else "tiles",
        "all experts": f"{figures['experts'] / 1e6:,.0f}",
        "chosen": f"{figures['chosen'] / 1e6:,.0f}",
        "floor": f"{floor / 1e6:,.0f}",
        "accessed": f"{read / 1e6:,.0f}",
        "x floor": f"{read / floor:.2f}",
        "temp": f"{figures['temp'] / 1e6:,.0f}",
    }


def pod_row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """A line on 64 chips: memory of one, and what crosses."""
    case = CASES[name]
    config = shape(case.model)
    crossing = [
        f"{found['count']} {kind}, {found['bytes'] / 1e6:,.1f} MB, most `{found['largest']}`"
        for kind, found in figures["collectives"].items()
    ]
    what = f"{case.method}, {case.length:,} tokens" if case.trains else "decode"
    return {
        "model": case.model,
        "mesh": " ".join(f"{axis}={size}" for axis, size in case.mesh),
        "what": f"{what}, {case.rows} rows, {case.layers or config.num_layers} of {config.num_layers} layers",
        "weights": f"{figures['weights'] / 1e9:.2f}",
        "caches": f"{figures['state'] / 1e9:.2f}",
        "temp": f"{figures['temp'] / 1e9:.2f}",
        "peak": f"{figures['peak'] / 1e9:.2f}",
        "collectives": "; ".join(crossing),
    }


def write_page(found: dict[str, dict[str, Any]]) -> None:
    """The tables of docs/sharding.md."""
    one = [decode_row(name, found[name]) for name in CASES if name in found and name not in _POD]
    pod = [pod_row(name, found[name]) for name in _POD if name in found]
    tables.put(PAGE, "models/experts_on_tpu", "\n\n".join(table(rows) for rows in (pod, one) if rows))


def environment(name: str) -> dict[str, str]:
    """Of a case's process."""
    return aot.child_environment(CASES[name].topology)


def main() -> None:
    aot_cases.run(
        "benchmarks.models.experts_on_tpu",
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
