"""Memory of Llama-3.1-8B streaming on TPU slices, compiled ahead of time on a CPU: does it fit, is anything copied?

    python -m benchmarks.caches.tpu_memory                    # all cases; half an hour on 2 cores
    python -m benchmarks.caches.tpu_memory --cases decode-8 --layers 2
    python -m benchmarks.caches.tpu_memory --cases decode-8 --option xla_tpu_msa_inefficient_use_to_copy_ratio=1.0

No weight is ever made: the model is a tree of shapes, placed on a mesh of chips that exist for the compiler only. Each
case runs in a process of its own and prints what the compiler assigned to one chip: arguments (weights, caches and
tokens), how much of the output aliases them (caches updated in place), temporaries, and copies into main memory.
`floor` is what a step must read: layers, head and slots once each. `accessed` is the compiler's own count, which takes
the prefetch of a weight into fast memory and its use there for two accesses. `-`: this jaxlib cannot print the program,
which has newer operations of libtpu. Prefill cases are one program with all layers; `read` calls a program a layer
(`streaming/by_layer/layerwise.py`), which was not compiled for TPUs here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import streamjax as sj
from benchmarks import aot
from benchmarks.reporting import report
from pallas_kernels.api import platforms
from streamjax.models.decoder import FlatModel
from streamjax.parallel.mesh import with_placement
from streamjax.parallel.rules import partition_spec
from streamjax.streaming.scan import _read_chunks
from streamjax.streaming.step import step

LLAMA = sj.UniformConfig(
    vocab_size=128256,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    rope=sj.RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_position=8192),
    max_position=131072,
)
CACHES = {
    "streaming_llm 4+4092": sj.kv.preset("streaming_llm", sinks=4, window=4092),
    "dense 32768": sj.kv.preset("dense", capacity=32768),
    "hsa 262144": sj.kv.preset("hsa", capacity=262144),
    "quest 262144 on the host": sj.kv.preset("quest", window=512, capacity=262144, page=64, top_k=32, placement="host"),
    "shadow_kv 262144": sj.kv.preset("shadow_kv", window=512, capacity=262144),
    "shadow_kv 262144, values on the host": sj.kv.preset("shadow_kv", window=512, capacity=262144, placement="host"),
    "inst_infer 262144": sj.kv.preset("inst_infer", window=512, capacity=262144, page=64, top_k=32),
}


def with_memory(config: sj.UniformConfig) -> sj.UniformConfig:
    """The same shape with windows of 512 and a chunk memory in its middle, which every fourth layer above reads."""
    middle = config.num_layers // 2
    hsa = sj.HSAConfig(tuple(range(middle, config.num_layers, 4)), (middle,), chunk_size=64, top_k=16)
    return config.replace(windows=(512,) * config.num_layers, hsa=hsa)


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: `chunks` chunks of `width` tokens for `batch` streams; a width of 1 is a decode step with logits."""

    topology: str
    mesh: tuple[tuple[str, int], ...]
    cache: str
    batch: int
    width: int
    chunks: int = 1
    layout: Literal["unrolled", "stacked"] = "unrolled"
    implementation: Literal["xla", "pallas"] | None = None  # of decoding


_V5E, _V5P = ("v5e:2x4", (("tensor", 8),)), ("v5p:2x2x1", (("tensor", 4),))
_ENDLESS, _DENSE, _HSA, _ON_HOST, _SHADOW, _SHADOW_HOST, _BY_HOST = CACHES
CASES = {
    "decode-8": Case(*_V5E, _ENDLESS, 8, 1),
    "decode-32": Case(*_V5E, _ENDLESS, 32, 1),
    "decode-32-data2": Case("v5e:2x4", (("data", 2), ("tensor", 4)), _ENDLESS, 32, 1),
    "decode-8-dense": Case(*_V5E, _DENSE, 8, 1),
    "decode-32-dense": Case(*_V5E, _DENSE, 32, 1),
    "decode-8-hsa": Case(*_V5E, _HSA, 8, 1),
    "decode-1-host-pages": Case("v6e:1x1", (("tensor", 1),), _ON_HOST, 1, 1),
    "decode-1-host-attention": Case("v5e:1x1", (("tensor", 1),), _BY_HOST, 1, 1),
    "decode-1-shadow": Case("v5e:1x1", (("tensor", 1),), _SHADOW, 1, 1),
    "decode-1-shadow-host-values": Case("v5e:1x1", (("tensor", 1),), _SHADOW_HOST, 1, 1),
    "decode-8-kernels": Case("v5e:1x1", (("tensor", 1),), _ENDLESS, 8, 1, implementation="pallas"),
    "decode-8-kernels-mesh": Case("v5e:2x4", (("data", 2), ("tensor", 4)), _ENDLESS, 8, 1, implementation="pallas"),
    "prefill-512": Case(*_V5P, _ENDLESS, 1, 512),
    "prefill-2048": Case(*_V5P, _ENDLESS, 1, 2048),
    "prefill-512x16": Case(*_V5P, _ENDLESS, 1, 512, 16),
    "prefill-512-batch8": Case(*_V5P, _ENDLESS, 8, 512),
    "prefill-512-stacked": Case(*_V5P, _ENDLESS, 1, 512, 1, "stacked"),
}


def compile_case(case: Case, layers: int, options: dict[str, str]) -> dict[str, Any]:
    """Compile one case under options of the compiler, in a process of `aot.child_environment`; bytes on one chip."""
    platforms.platform_implementation = lambda: "tpu"  # JAX runs on a CPU here
    mesh = aot.tpu_mesh(case.topology, **dict(case.mesh))
    config = LLAMA.replace(num_layers=layers)
    config = with_memory(config) if case.cache == _HSA else config
    with jax.set_mesh(mesh):
        model = jax.eval_shape(
            lambda: sj.Decoder(config, jax.random.key(0), dtype=jnp.bfloat16, scan_layers=case.layout == "stacked")
        )
        state = jax.eval_shape(
            lambda model: sj.init_state(model, CACHES[case.cache], case.batch, implementation=case.implementation),
            model,
        )
        model, state = with_placement(model, mesh), _with_host_pages(with_placement(state, mesh))
        start, cpu = time.perf_counter(), time.process_time()
        lowered = _trace(case, mesh, model, state).lower()
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"fits": False, "weights": aot.bytes_per_device(model), "state": aot.bytes_per_device(state)}
    memory = compiled.memory_analysis()
    weights, slots = aot.bytes_per_device(model), aot.bytes_per_device(state)
    return {
        "fits": True,
        "weights": weights,
        "state": slots,
        "argument": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "host": memory.host_argument_size_in_bytes,
        "host_alias": memory.host_alias_size_in_bytes,
        "host_temp": memory.host_temp_size_in_bytes,
        "floor": slots + aot.bytes_per_device((model.stack, model.layers, model.head if case.width == 1 else None)),
        **_of_the_text(compiled),
        "compile_s": time.perf_counter() - start,
        "compile_cpu_s": time.process_time() - cpu,
    }


def _with_host_pages(state: sj.StreamState) -> sj.StreamState:
    """A placed state, keys and values of tiers that want it in the host's memory."""

    def moved(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind("pinned_host"))

    def place(tier: sj.kv.Tier, part: Any) -> Any:
        if not isinstance(tier, sj.kv.Pages | sj.kv.Shadow) or tier.placement == "device":
            return part
        if isinstance(tier, sj.kv.Shadow):
            values = dataclasses.replace(part.slots.v, codes=moved(part.slots.v.codes))
            return dataclasses.replace(part, slots=dataclasses.replace(part.slots, v=values))
        ring = dataclasses.replace(part.tokens, k=moved(part.tokens.k), v=moved(part.tokens.v))
        return dataclasses.replace(part, tokens=ring)

    layers = list(state.layers)
    for i, cache in enumerate(state.caches):
        if isinstance(cache, sj.kv.Cascade):
            layers[i] = tuple(map(place, cache.tiers, state.layers[i]))
    return dataclasses.replace(state, layers=tuple(layers))


def _trace(case: Case, mesh: Mesh, model: sj.Decoder, state: sj.StreamState) -> Any:
    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        rows = partition_spec(("batch", None)[: len(shape)], shape, mesh)
        lead = () if case.width == 1 else (case.chunks,)
        sharding = NamedSharding(mesh, PartitionSpec(*(None,) * len(lead), *rows))
        return jax.ShapeDtypeStruct((*lead, *shape), jnp.int32, sharding=sharding)

    tokens, count = integers(case.batch, case.width), integers(case.batch)
    if case.width == 1:
        return step.trace(model, state, tokens, count)
    return _read_chunks.trace(FlatModel(model), state, tokens, count)


def _of_the_text(compiled: Any) -> dict[str, Any]:
    """What is read off the program; None for a program that this jaxlib cannot print (newer operations of libtpu)."""
    try:
        text, cost = compiled.as_text(), compiled.cost_analysis()
    except jax.errors.JaxRuntimeError:
        return {"copied": None, "accessed": None, "collectives": None}
    return {
        "copied": aot.copied_bytes(text),
        "accessed": int(cost["bytes accessed"]),
        "collectives": aot.collectives(text),
        "kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
    }


def run_case(name: str, layers: int, options: Sequence[str] = ()) -> dict[str, Any]:
    """Compile one case in a fresh process and return its figures.

    Raises:
      RuntimeError: the compile failed; the message is the process's last line.
    """
    command = [sys.executable, "-m", "benchmarks.caches.tpu_memory", "--child", name, "--layers", str(layers)]
    command += ["--option", *options] if options else []
    environment = aot.child_environment(CASES[name].topology)
    child = subprocess.run(command, cwd=aot.ROOT, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{name}: {child.stderr.strip().splitlines()[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def row(name: str, layers: int, figures: dict[str, Any]) -> dict[str, Any]:
    """A line of the table: MB on one chip."""
    case = CASES[name]

    def megabytes(key: str) -> str:
        value = figures.get(key)
        return "-" if value is None else f"{value / 1e6:,.1f}"

    return {
        "case": name,
        "slice": case.topology,
        "mesh": " ".join(f"{axis}={size}" for axis, size in case.mesh),
        "cache": case.cache,
        "batch x tokens": f"{case.batch} x {case.width}" + (f" x {case.chunks}" if case.chunks > 1 else ""),
        "layers": f"{layers} {case.layout}",
        **{key: megabytes(key) for key in ("weights", "state")},
        **{key: megabytes(key) if figures["fits"] else "does not fit" for key in ("argument",)},
        **{key: megabytes(key) for key in ("alias", "temp", "host", "copied", "floor", "accessed")},
        "compile, CPU s": f"{figures['compile_cpu_s']:.0f}" if figures["fits"] else "-",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--layers", type=int, default=LLAMA.num_layers)
    parser.add_argument("--output", type=Path, help="JSON file; benchmarks/results/caches/tpu_memory.json by default")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--option", nargs="+", default=[], metavar="NAME=VALUE", help="options of the TPU compiler")
    arguments = parser.parse_args()
    if arguments.child:
        options = dict(option.split("=", 1) for option in arguments.option)
        print(json.dumps(compile_case(CASES[arguments.child], arguments.layers, options)))
        return
    figures = {}
    for name in arguments.cases:
        figures[name] = run_case(name, arguments.layers, arguments.option)
        print(name, json.dumps(figures[name]), flush=True)
    rows = [row(name, arguments.layers, found) for name, found in figures.items()]
    report(
        "caches/tpu_memory",
        rows,
        arguments.output,
        layers=arguments.layers,
        options=arguments.option,
        bytes_on_one_chip=figures,
    )


if __name__ == "__main__":
    main()
