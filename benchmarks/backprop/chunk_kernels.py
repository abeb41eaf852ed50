"""Chunked backprop with kernels and with XLA's loops, compiled ahead of time: temporaries, and calls of kernels.

    python -m benchmarks.backprop.chunk_kernels                 # v5e and H100, both orders: five minutes on 2 cores
    python -m benchmarks.backprop.chunk_kernels --chips h100

Four layers of a known model, one sequence, bf16. Kernels must not cost memory: they read keys where they lie, and add
to gradients in place.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.backprop.compile_case import Case, compile_case
from benchmarks.model_shapes import SHAPES
from benchmarks.reporting import report

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "h100": "h100"}
ORDERS = ("layer", "chunk")
LAYERS = 4


def rows(chips: list[str], model: str, length: int) -> Iterator[dict[str, Any]]:
    """A line a chip and order."""
    config = SHAPES[model].replace(num_layers=LAYERS)
    for chip in chips:
        for order in ORDERS:
            plain = Case(config, CHIPS[chip], length, {"method": order, "chunk_size": 2048})
            loops, kernels = (compile_case(case) for case in (plain, Case(**{**vars(plain), "kernels": True})))
            yield {
                "chip": chip,
                "order": order,
                "calls of kernels": kernels["kernels"],
                "temporaries MB, kernels": round(kernels["temp"] / 1e6),
                "loops": round(loops["temp"] / 1e6),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=["v5e", "h100"])
    parser.add_argument("--model", choices=("qwen2.5-0.5b", "qwen3-8b", "llama-3.1-8b"), default="qwen2.5-0.5b")
    parser.add_argument("--length", type=int, default=32768, help="tokens")
    arguments = parser.parse_args()
    report("backprop/chunk_kernels", list(rows(arguments.chips, arguments.model, arguments.length)))


if __name__ == "__main__":
    main()
