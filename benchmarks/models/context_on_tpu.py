"""Llama-3.1-8B and Qwen3-8B trained on a million tokens by 64 and 256 chips: their memory, and what they exchange.

    python -m benchmarks.models.context_on_tpu                    # all cases
    python -m benchmarks.models.context_on_tpu --missing          # those without figures yet
    python -m benchmarks.models.context_on_tpu --cases llama-v5p-64-fsdp8-context8
    python -m benchmarks.models.context_on_tpu --page             # compile nothing, write docs/sharding.md

No weight is ever made: a training step with AdamW (float32 weights and moments, bfloat16 activations, all layers,
stacked) is compiled ahead of time from shapes, for chips that exist for the compiler only. Each case is compiled in a
process of its own, until the compiler has placed its buffers. Each row of chips along `data` and `fsdp` has one
sequence. `peak` is the compiler's figure of one chip, and `estimated` that of the model from which
`--config.mesh=auto` chooses, in GB.

`sent` is what a chip receives in a step: results of collectives, those in loops as often as the loops turn, as the
compiler writes it down. `ring floor` is what full attention must move by a ring: keys and values of each layer once
round forwards, once for the recomputation unless attention is `kept`, and once backwards, where their float32
gradients follow them.

`beside products` is how many of the collectives in the program's text begin and end apart with a product, a kernel or
a loop between.

The second table is what that search takes, with its seconds a step and what most of them go to.
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
from benchmarks.model_shapes import SHAPES
from benchmarks.models import aot_cases
from benchmarks.reporting import RESULTS, table
from pallas_kernels.api import platforms
from streamjax.parallel.mesh import with_placement
from streamjax.parallel.rules import partition_spec
from streamjax.training import (
    OptimizerConfig,
    chip_of,
    choose_mesh,
    estimate,
    make_optimizer,
    make_train_step,
    new_state,
)

PAGE = Path(__file__).parents[2] / "docs" / "sharding.md"
OUTPUT = RESULTS / "models" / "context_on_tpu.json"
LENGTH = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """A step on sequences of a million tokens, as many as `data` and `fsdp` split."""

    model: str
    topology: str
    mesh: tuple[tuple[str, int], ...]
    exchange: str = "ring"
    method: str = "remat"
    offload: bool = False
    kept: bool = False  # what attention found

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `loss_and_grad` and `estimate`."""
        return {"method": self.method, "offload": "host" if self.offload else None, "keep_attention": self.kept}

    @property
    def rows(self) -> int:
        return math.prod(size for axis, size in self.mesh if axis in ("data", "fsdp"))

    @property
    def chips(self) -> int:
        return math.prod(size for _, size in self.mesh)


CHIPS = {"v5p-64": "v5p:4x4x4", "v5p-256": "v5p:4x8x8", "v6e-64": "v6e:8x8", "v6e-256": "v6e:16x16"}


def _cases(model: str, chips: str, *splits: str, **known: Any) -> dict[str, Case]:
    """Cases by their names, each split written as in "fsdp8-context8"."""
    found = {}
    for split in splits:
        mesh = tuple((name, int(size)) for name, size in re.findall(r"([a-z]+)(\d+)", split))
        name = "-".join([model.partition("-")[0], chips, split, *(str(x) for x in known.values() if x is not True)])
        name += "-kept" * known.get("kept", False)
        found[name] = Case(model, CHIPS[chips], mesh, **known)
    return found


_LLAMA, _QWEN = "llama-3.1-8b", "qwen3-8b"
CASES = {
    **_cases(_LLAMA, "v5p-64", "fsdp8-context8", "fsdp4-context16", "context16-tensor4"),
    **_cases(_LLAMA, "v6e-256", "fsdp8-context32"),
    **_cases(_LLAMA, "v5p-256", "fsdp8-context32"),
    **_cases(_QWEN, "v5p-64", "fsdp8-context8"),
    **_cases(_QWEN, "v6e-256", "fsdp8-context32"),
    **_cases(_LLAMA, "v6e-64", "fsdp4-context16"),
    **_cases(_LLAMA, "v5p-64", "fsdp8-tensor8", method="chunk"),
    **_cases(_LLAMA, "v5p-64", "fsdp8-tensor8", method="layer", offload=True),
    **_cases(_LLAMA, "v5p-64", "context16-tensor4", exchange="gather"),
    **_cases(_QWEN, "v5p-256", "fsdp8-context32"),
    **_cases(_LLAMA, "v6e-256", "context32-tensor8", "fsdp2-context32-tensor4"),
    **_cases(_LLAMA, "v5p-256", "fsdp16-context16", "context64-tensor4"),
    **_cases(_QWEN, "v6e-64", "fsdp4-context16"),
    **_cases(_LLAMA, "v5p-256", "fsdp8-context32", kept=True),
    **_cases(_LLAMA, "v6e-256", "context32-tensor8", kept=True),
    **_cases(_LLAMA, "v5p-64", "fsdp8-context8", method="layer"),
    **_cases(_LLAMA, "v5p-64", "fsdp8-context8", method="chunk"),
    **_cases(_LLAMA, "v6e-64", "context8-tensor8", method="chunk"),
    **_cases(_LLAMA, "v6e-256", "fsdp8-context32", method="layer"),
}
CASES["llama-v5p-64-fsdp8-context8-layer-host"] = dataclasses.replace(
    CASES["llama-v5p-64-fsdp8-context8-layer"], offload=True
)


def compile_case(case: Case) -> None:
    """Compile one case, in a process of `aot.child_environment`, as far as its buffers."""
    platforms.platform_implementation = lambda: "tpu"  # JAX runs on a CPU here
    mesh, config = aot.tpu_mesh(case.topology, **dict(case.mesh)), SHAPES[case.model]
    optimizer = make_optimizer(OptimizerConfig(), 1000)

    def build() -> Any:
        model = sj.Decoder(config, jax.random.key(0), dtype=jnp.bfloat16, param_dtype=jnp.float32, scan_layers=True)
        return new_state(model, optimizer)

    with jax.set_mesh(mesh):
        state = with_placement(jax.eval_shape(build), mesh)
        shape = case.rows, LENGTH
        placement = NamedSharding(mesh, partition_spec(("batch", "length"), shape, mesh))
        dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement) for name, dtype in dtypes.items()}
        step = make_train_step(optimizer, context_exchange=case.exchange, **case.options)
        lowered = step.trace(state, batch).lower()  # type: ignore[attr-defined]
        print(json.dumps({"state": aot.bytes_per_device(state)}), flush=True)
        aot.compile_until_assigned(lowered)


def read_case(printed: dict[str, Any], text: str, memory: dict[str, int]) -> dict[str, Any]:
    """Figures of a case: bytes of a chip's main memory, and what crosses."""
    return {
        **printed,
        "memory": memory,
        "kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "collectives": received(text),
        "covered": {kind: overlaps(text, kind) for kind in ("all-gather", "all-reduce", "collective-permute")},
    }


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", flags=re.M | re.S)
_LOOP = re.compile(r" while\(.*?condition=%?([\w.\-]+).*?body=%?([\w.\-]+)")
_TURNS = re.compile(r"constant\((\d+)\)")  # in a loop's condition: loops count from 0
_CALL = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_OPERATION = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_RESULT = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}


def overlaps(text: str, kind: str) -> dict[str, int]:
    """Collectives of a kind in a scheduled program: all, those that begin and end apart, and those of them that have a
    product, a kernel or a loop between."""
    bodies = dict(_COMPUTATION.findall(text))
    with_product = {name for name, body in bodies.items() if re.search(r" (convolution|dot)\(", body)}
    starts = re.compile(rf"^\s*(?:ROOT )?%?([\w.\-]+) = .* {kind}-start\(")
    at_once = begun = covered = 0
    for body in bodies.values():
        lines = body.splitlines()
        at_once += sum(f" {kind}(" in line for line in lines)
        for place, line in enumerate(lines):
            if not (start := starts.match(line)):
                continue
            begun += 1
            end = re.compile(rf"{kind}-done\(.*%?{re.escape(start[1])}\b")
            for after in lines[place + 1 :]:
                if end.search(after):
                    break
                called = re.search(r"calls=%?([\w.\-]+)", after)
                if re.search(r" (convolution|while)\(|tpu_custom_call", after) or (
                    called and called[1] in with_product
                ):
                    covered += 1
                    break
    return {"all": at_once + begun, "async": begun, "covered": covered}


def received(text: str) -> dict[str, dict[str, Any]]:
    """Of each kind of collective: how often a step runs one, bytes of the results, and the largest result."""
    bodies = dict(_COMPUTATION.findall(text))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, flags=re.M)
    assert entry is not None
    runs: Counter[str] = Counter()

    def walk(name: str, times: int) -> None:
        runs[name] += times
        for line in bodies.get(name, "").splitlines():
            if loop := _LOOP.search(line):
                turns = _TURNS.findall(bodies[loop[1]])  # none where only the data tell: once, then
                walk(loop[2], times * int(turns[-1] if turns else 1))
            elif (called := _CALL.search(line)) and called[1] in bodies:
                walk(called[1], times)

    walk(entry[1], 1)
    number, size, largest = Counter(), Counter(), {}
    for name, times in runs.items():
        for result, kind, begun in _OPERATION.findall(bodies.get(name, "")):
            parts = [part for part in _RESULT.findall(result) if part[1]]
            if begun and kind in ("all-gather", "collective-permute"):
                parts = parts[len(parts) // 2 :]  # behind the operands
            each = [
                (_BYTES.get(t, 4) * math.prod(int(n) for n in dims.split(",")), f"{t}[{dims}]") for t, dims in parts
            ]
            if not each:
                continue
            number[kind] += times
            size[kind] += times * sum(width for width, _ in each)
            largest[kind] = max(largest.get(kind, (-1, "")), max(each))
    return {kind: {"count": number[kind], "bytes": size[kind], "largest": largest[kind][1]} for kind in sorted(number)}


def ring_floor(case: Case) -> float:
    """Bytes of keys and values that a chip must receive for full attention in a step, by a ring; see the docstring."""
    config, axes = SHAPES[case.model], dict(case.mesh)
    turns = 0 if case.method == "chunk" else axes.get("context", 1) - 1
    keys = 2 * LENGTH // (turns + 1) * config.num_kv_heads // axes.get("tensor", 1) * config.head_dim
    return config.num_layers * keys * (turns * (2 if case.kept else 3) * 2 + (turns + 1) * 4) if turns else 0.0


def estimated(case: Case) -> int:
    """Bytes on a chip by the memory model, from which `--config.mesh=auto` chooses."""
    config, axes = SHAPES[case.model], dict(case.mesh)
    tensor = axes.get("tensor", 1)
    shards = axes.get("fsdp", 1) * tensor
    memory = estimate(
        config,
        batch_size=1,
        length=LENGTH // axes.get("context", 1),
        param_dtype="float32",
        shards=shards,
        tensor=tensor,
        context=axes.get("context", 1),
        **case.options,
    )
    return memory.device_bytes + 8 * config.parameter_count // shards


def chosen_row(model: str, chips: str, rows: int) -> dict[str, str]:
    """What the search takes for so many sequences of a million tokens."""
    kind, count = chips.split("-")
    first = {"model": model, "chips": f"{count} {kind}", "rows": str(rows)}
    try:
        found = choose_mesh(SHAPES[model], int(count), chip_of(f"TPU {kind}"), rows=rows, length=LENGTH)
    except ValueError as refused:
        closest = re.search(r"closest: (.*?), estimated ([\d.]+) GB", str(refused))
        assert closest is not None
        return {
            **first,
            "mesh": "none",
            "order": "",
            "GB a chip": f"{closest[2]} ({closest[1]})",
            "seconds": "",
            "of it": "",
        }
    longest = sorted(found.seconds, key=lambda name: -found.seconds[name])[:3]
    return {
        **first,
        "mesh": " ".join(f"{axis}={size}" for axis, size in found.axes.items() if size > 1),
        "order": str(found.arguments["method"])
        + ", kept" * found.arguments.get("keep_attention", False)
        + (f", segment {found.arguments['segment']}" if "segment" in found.arguments else "")
        + (f", {found.arguments['offload_fraction']:.2g} in the host" if "offload" in found.arguments else ""),
        "GB a chip": f"{found.device_bytes / 1e9:.1f}",
        "seconds": f"{sum(found.seconds.values()):.1f}",
        "of it": ", ".join(f"{name} {found.seconds[name]:.3g}" for name in longest if found.seconds[name] >= 0.01),
    }


def row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """A line of the table, in GB."""
    case = CASES[name]
    axes = dict(case.mesh)
    first = {
        "model": case.model,
        "chips": f"{case.chips} {case.topology.partition(':')[0]}",
        "mesh": " ".join(f"{axis}={size}" for axis, size in case.mesh),
        "order": case.method
        + f", {_exchange(case)}" * (axes.get("context", 1) > 1)
        + ", kept" * case.kept
        + ", host" * case.offload,
        "tokens a chip": f"{LENGTH // axes.get('context', 1):,}",
        "weights, moments": f"{figures['state'] / 1e9:.1f}",
    }
    last = {"estimated": f"{estimated(case) / 1e9:.1f}", "ring floor": f"{ring_floor(case) / 1e9:,.1f}"}
    if "does_not_fit" in figures:
        wanted = f"{figures['does_not_fit'] / 1e9:.1f}: does not fit"
        return {**first, "peak": wanted, **last, "sent": "-", "beside products": "-"}
    sent = "; ".join(
        f"{found['count']:,} {kind}, {found['bytes'] / 1e9:,.1f} GB, most `{found['largest']}`"
        for kind, found in figures["collectives"].items()
    )
    peak, limit = figures["memory"]["default"], aot.TOPOLOGIES[case.topology].memory_bytes
    host = f", host {figures['memory']['host'] / 1e9:.1f}" if figures["memory"].get("host", 0) > 1e6 else ""
    covered = ", ".join(
        f"{counts['covered']} of {counts['all']} {kind}s"
        for kind, counts in figures["covered"].items()
        if counts["all"]
    )
    return {
        **first,
        "peak": f"{peak / 1e9:.1f}{host}{': does not fit' if peak > limit else ''}",
        **last,
        "sent": sent,
        "beside products": covered,
    }


def _exchange(case: Case) -> str:
    return "pipeline" if case.method == "chunk" else case.exchange


def write_page(found: dict[str, dict[str, Any]]) -> None:
    """The tables of docs/sharding.md."""
    compiled = table([row(name, found[name]) for name in CASES if name in found])
    chosen = table([chosen_row(model, chips, rows) for model in (_LLAMA, _QWEN) for chips in CHIPS for rows in (8, 1)])
    tables.put(PAGE, "models/context_on_tpu", f"{compiled}\n\n{chosen}")


def environment(name: str) -> dict[str, str]:
    """Of a case's process."""
    return aot.child_environment(CASES[name].topology)


def main() -> None:
    aot_cases.run(
        "benchmarks.models.context_on_tpu",
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
