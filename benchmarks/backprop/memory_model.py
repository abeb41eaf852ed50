"""The memory model against the compiler: what gradient steps need of one v5p, estimated and compiled, side by side.

    python -m benchmarks.backprop.memory_model          # compile what is missing; 1 to 5 minutes a case
    python -m benchmarks.backprop.memory_model --again --methods layer      # compile these again
    python -m benchmarks.backprop.memory_model --table                      # compile nothing, compare what there is

Published models, bf16, layers stacked; every compiled figure is that of `backprop_compile.compile_case`. A program that
the compiler refuses for its size counts with what the compiler says it needs. The figures are in
benchmarks/results/backprop/memory_model.json, with which
`tests/training/backprop/test_memory_model.py` compares the model, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.backprop.compile_case import Case, compile_case
from benchmarks.model_shapes import SHAPES
from benchmarks.reporting import RESULTS, machine, table
from streamjax.training.backprop.planning.memory_model import Memory, estimate

OUTPUT = RESULTS / "backprop/memory_model.json"
TOPOLOGY = "v5p:2x2x1"
_CUT = {"chunk_size": 2048}
_HOST = {"method": "layer", **_CUT, "offload": "host"}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "full": {"method": "full"},
    "remat": {"method": "remat"},
    "remat-kept": {"method": "remat", "keep_attention": True},
    "layer": {"method": "layer", **_CUT},
    "layer-kept": {"method": "layer", **_CUT, "keep_attention": True},
    "layer-segment-4": {"method": "layer", **_CUT, "segment": 4},
    "layer-segment-6": {"method": "layer", **_CUT, "segment": 6},
    "layer-host": _HOST,
    "layer-half-host": {**_HOST, "offload_fraction": 0.5},
    "layer-kept-half-host": {**_HOST, "offload_fraction": 0.5, "keep_attention": True},
    "chunk": {"method": "chunk", **_CUT},
    "chunk-bf16": {"method": "chunk", **_CUT, "grad_dtype": "bfloat16", "kv_grad_dtype": "bfloat16"},
}


class Point(NamedTuple):
    """One case: a published model, an entry of `METHODS`, tokens of a row, rows."""

    model: str
    method: str
    length: int
    rows: int = 1

    @property
    def key(self) -> str:
        return f"{self.model}/{self.method}/{self.length}/{self.rows}"

    @classmethod
    def parse(cls, key: str) -> Point:
        model, method, length, rows = key.split("/")
        return cls(model, method, int(length), int(rows))

    def estimate(self) -> Memory:
        return estimate(SHAPES[self.model], batch_size=self.rows, length=self.length, **METHODS[self.method])

    def compile(self) -> dict[str, Any]:
        return compile_case(Case(SHAPES[self.model], TOPOLOGY, self.length, METHODS[self.method], self.rows))


POINTS = (
    *(
        Point("qwen3-8b", method, length)
        for method in ("full", "remat", "layer", "layer-segment-6", "layer-host", "chunk", "chunk-bf16")
        for length in (16384, 65536)
    ),
    *(
        Point("qwen2.5-0.5b", method, length, rows)
        for method in ("remat", "layer", "chunk")
        for length, rows in ((16384, 1), (65536, 2))
    ),
    *(Point("qwen3-8b", method, 32768) for method in ("remat-kept", "layer-kept", "layer-kept-half-host")),
    Point("qwen2.5-0.5b", "layer-kept", 65536, 2),
    Point("qwen2.5-0.5b", "full", 16384),
    Point("qwen2.5-0.5b", "layer-segment-4", 65536, 2),
    Point("qwen2.5-0.5b", "layer-host", 65536, 2),
    Point("gemma-3-4b", "remat", 32768),
    Point("gemma-3-4b", "layer", 16384),
    Point("gemma-3-4b", "chunk-bf16", 32768),
)


def load(path: Path = OUTPUT) -> dict[Point, Mapping[str, Any]]:
    """Compiled figures by case."""
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    return {Point.parse(key): figures for key, figures in cases.items()}


def save(found: Mapping[Point, Mapping[str, Any]], path: Path = OUTPUT) -> None:
    cases = {point.key: dict(figures) for point, figures in sorted(found.items())}
    body = {"benchmark": "backprop/memory_model", "machine": machine(), "topology": TOPOLOGY, "arguments": METHODS}
    path.write_text(json.dumps({**body, "cases": cases}, indent=1) + "\n")


def row(point: Point, figures: Mapping[str, Any]) -> dict[str, str]:
    """One line of the table."""
    found = point.estimate()
    return {
        "model": point.model,
        "method": point.method,
        "tokens": f"{point.rows} x {point.length:,}",
        "compiled GB": f"{figures['peak'] / 1e9:.2f}",
        "estimated GB": f"{found.device_bytes / 1e9:.2f}",
        "error": f"{found.device_bytes / figures['peak'] - 1:+.1%}",
        "host GB": f"{figures.get('host_temp', 0) / 1e9:.2f}",
        "estimated host GB": f"{found.host_bytes / 1e9:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--again", action="store_true", help="compile also what there is")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    found = load()
    for point in POINTS:
        wanted = point.model in arguments.models and point.method in arguments.methods
        if wanted and not arguments.table and (arguments.again or point not in found):
            found[point] = point.compile()
            save(found)
            print(row(point, found[point]), flush=True)
    print(table([row(point, figures) for point, figures in sorted(found.items())]))


if __name__ == "__main__":
    main()
