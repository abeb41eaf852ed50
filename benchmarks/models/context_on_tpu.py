"""Llama-3.1-8B trained on a million tokens by 64 chips, compiled ahead of time: memory of one, and what they exchange.

    python -m benchmarks.models.context_on_tpu                    # all cases
    python -m benchmarks.models.context_on_tpu --cases fsdp4-context16
    python -m benchmarks.models.context_on_tpu --page             # compile nothing, write docs/sharding.md

No weight is ever made: a training step with AdamW (float32 weights and moments, bfloat16 activations, layers stacked
and computed again) is compiled from shapes, for chips that exist for the compiler only. Each case is compiled in a
process of its own.

`sent` is what a chip receives in a step: results of collectives, those in loops as often as the loops turn, as the
compiler writes it down. `ring floor` is what full attention must move by a ring: keys and values of each layer once
round forwards, once for the recomputation and once backwards, where their float32 gradients follow them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
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
from streamjax.training import OptimizerConfig, make_optimizer, make_train_step, new_state

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
}


def compile_case(case: Case) -> dict[str, Any]:
    """Compile one case, in a process of `aot.child_environment`; bytes on one chip."""
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
        start = time.process_time()
        options: dict[str, Any] = {"offload": "host"} if case.offload else {}
        step = make_train_step(optimizer, method=case.method, context_exchange=case.exchange, **options)
        lowered = step.trace(state, batch).lower()  # type: ignore[attr-defined]
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", str(error))
            return {
                "state": aot.bytes_per_device(state),
                "used": int(float(used[1]) * 2**30) if used else None,
                "compile_cpu_s": time.process_time() - start,
            }
    memory = compiled.memory_analysis()
    folder = Path(os.environ["LIBTPU_INIT_ARGS"].split()[0].partition("=")[2])
    text = max(folder.glob("*-TLP-hlo.txt"), key=lambda path: path.stat().st_size).read_text()
    if keep := os.environ.get("KEEP_HLO"):
        Path(keep).write_text(text)
    kinds = ("argument", "output", "alias", "temp")
    return {
        "state": aot.bytes_per_device(state),
        **{kind: getattr(memory, f"{kind}_size_in_bytes") for kind in kinds},
        "host": memory.host_temp_size_in_bytes,
        "kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "collectives": received(text),
        "compile_cpu_s": time.process_time() - start,
    }


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", flags=re.M | re.S)
_LOOP = re.compile(r" while\(.*?condition=%?([\w.\-]+).*?body=%?([\w.\-]+)")
_TURNS = re.compile(r"constant\((\d+)\)")  # in a loop's condition: loops count from 0
_CALL = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_OPERATION = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_RESULT = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}


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
                walk(loop[2], times * int(_TURNS.findall(bodies[loop[1]])[-1]))
            elif (called := _CALL.search(line)) and called[1] in bodies:
                walk(called[1], times)

    walk(entry[1], 1)
    number, size, largest = Counter(), Counter(), {}
    for name, times in runs.items():
        for result, kind, begun in _OPERATION.findall(bodies.get(name, "")):
            parts = [part for part in _RESULT.findall(result) if part[1]]
            if begun and kind in ("all-gather", "collective-permute"):
                parts = parts[len(parts) // 2 :]  # behind the operands
            each = {f"{t}[{dims}]": _BYTES.get(t, 4) * math.prod(int(n) for n in dims.split(",")) for t, dims in parts}
            if not each:
                continue
            number[kind] += times
            size[kind] += times * sum(each.values())
            top = max(each, key=lambda name: each[name])
            if each[top] > largest.get(kind, ("", -1))[1]:
                largest[kind] = (top, each[top])
    return {kind: {"count": number[kind], "bytes": size[kind], "largest": largest[kind][0]} for kind in sorted(number)}


def ring_floor(case: Case) -> float:
    """Bytes of keys and values that a chip must receive for full attention in a step, by a ring; see the docstring."""
    config, axes = SHAPES[case.model], dict(case.mesh)
    turns = axes.get("context", 1) - 1
    keys = 2 * LENGTH // (turns + 1) * config.num_kv_heads // axes.get("tensor", 1) * config.head_dim
    return config.num_layers * keys * (turns * 3 * 2 + (turns + 1) * 4) if turns else 0.0


def row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """A line of the table, in GB."""
    case = CASES[name]
    axes = dict(case.mesh)
    first = {
        "model": case.model,
        "chips": f"{case.chips} {case.topology.partition(':')[0]}",
        "mesh": " ".join(f"{axis}={size}" for axis, size in case.mesh),
        "order": case.method + (f", {case.exchange}" if axes.get("context", 1) > 1 else ""),
        "tokens a chip": f"{LENGTH // axes.get('context', 1):,}",
        "weights, moments": f"{figures['state'] / 1e9:.1f}",
    }
    if "temp" not in figures:
        used = figures.get("used")
        peak = f"{used / 1e9:.1f}: does not fit" if used else "does not fit"
        return {**first, "temp": "-", "peak": peak, "sent": "-", "ring floor": f"{ring_floor(case) / 1e9:,.1f}"}
    sent = "; ".join(
        f"{found['count']:,} {kind}, {found['bytes'] / 1e9:,.1f} GB, most `{found['largest']}`"
        for kind, found in figures["collectives"].items()
    )
    peak = figures["argument"] + figures["output"] - figures["alias"] + figures["temp"]
    host = f", host {figures['host'] / 1e9:.1f}" if figures["host"] else ""
    return {
        **first,
        "temp": f"{figures['temp'] / 1e9:.1f}{host}",
        "peak": f"{peak / 1e9:.1f}",
        "sent": sent,
        "ring floor": f"{ring_floor(case) / 1e9:,.1f}",
    }


def write_page(found: dict[str, dict[str, Any]]) -> None:
    """The table of docs/sharding.md."""
    tables.put(PAGE, "models/context_on_tpu", table([row(name, found[name]) for name in CASES if name in found]))


def environment(name: str, folder: str) -> dict[str, str]:
    """Of a case's process: the compiler writes the scheduled program into the folder."""
    found = aot.child_environment(CASES[name].topology)
    found["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=false"
    return found


def main() -> None:
    aot_cases.run(
        "benchmarks.models.context_on_tpu",
        __doc__,
        CASES,
        OUTPUT,
        compile_case=compile_case,
        write_page=write_page,
        environment=environment,
    )


if __name__ == "__main__":
    main()
