"""LeMo's memory and time: a gradient where layers compute a share of their tokens, compiled ahead of time for one chip.

    python -m benchmarks.training.lemo_memory            # half an hour on 2 quiet cores
    python -m benchmarks.training.lemo_memory --chips v5e --methods remat      # these rows anew, the others as they are
    python -m benchmarks.training.lemo_memory --chips v5p --methods remat --shares 0.5      # one row anew

Qwen2.5-0.5B, bf16 parameters and gradients, layers stacked, attention by kernels; every layer has the same share.
`full` keeps all activations, `remat` layers' inputs. `temporaries GB` is what the compiler assigns beside parameters
and gradients, or, where the program does not fit, what it says that all needs.

`ms` is what the compiler's own figures say of a program that fits: `xla` what it expects of its fusions, `attention`
and `loss` the schedules of the kernels (`benchmarks/backprop/step_cycles.py`). `x ms` is beside the same method with
all tokens. `predictors` is what their products take at the chip's peak, a part of `xla`. Nothing was run on a TPU,
and copies that the chip waits for are not in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.backprop.compile_case import Case
from benchmarks.backprop.step_cycles import CHIPS as CLOCKS
from benchmarks.backprop.step_cycles import step_cycles
from benchmarks.model_shapes import SHAPES
from benchmarks.reporting import RESULTS, report
from streamjax.training import LeMoConfig

SHARES = (1.0, 0.7, 0.5)
CHIPS = {"v5e": ("v5e:1x1", 16384), "v5p": ("v5p:2x2x1", 32768)}
METHODS = ("full", "remat")
PARTS = {"ms": "seconds", "xla": "xla", "attention": "attention", "loss": "loss"}


def measure(chip: str, method: str, length: int, share: float) -> dict[str, Any]:
    """A row of the table, compiled in a process of its own."""
    case = Case(
        SHAPES["qwen2.5-0.5b"], CHIPS[chip][0], length, {"method": method}, kernels=True,
        shares=None if share == 1 else (share,),
    )  # fmt: skip
    found = step_cycles(case)
    row = {"chip": chip, "method": method, "tokens": length, "share": share}
    row |= {"temporaries GB": found.get("temp", found["peak"]) / 1e9, "fits": found["fits"]}
    return row | {name: 1e3 * found[part] if part in found else "-" for name, part in PARTS.items()}


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their time beside that of the same method with all tokens, and what predictors take of it."""
    whole = {(row["chip"], row["method"], row["tokens"]): row.get("ms", "-") for row in rows if row["share"] == 1}

    def ratio(row: dict[str, Any]) -> float | str:
        beside = whole.get((row["chip"], row["method"], row["tokens"]), "-")
        own = row.get("ms", "-")
        return "-" if "-" in (own, beside) else own / beside

    return [{**row, "x ms": ratio(row), "predictors": _predictors(row)} for row in rows]


def _predictors(row: dict[str, Any]) -> float | str:
    """Milliseconds of two networks a layer, forwards alone: two matrices for each token, one for each block."""
    config, sizes, chip = SHAPES["qwen2.5-0.5b"], LeMoConfig(), CLOCKS[row["chip"]]
    token = sizes.width * (config.d_model + sizes.width) + sizes.width * sizes.channels / sizes.block
    flops = 2 * 2 * config.num_layers * row["tokens"] * token
    return (
        "-" if row["share"] == 1 or row.get("ms", "-") == "-" else 1e3 * flops / (chip.cores * chip.flops * chip.clock)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row; by default one for each chip")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", choices=SHARES, default=list(SHARES), help="of the tokens")
    parser.add_argument("--output", type=Path, default=RESULTS / "training" / "lemo_memory.json", help="of the rows")
    arguments = parser.parse_args()
    saved = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    rows = {(row["chip"], row["method"], row["tokens"], -row["share"]): row for row in saved}
    for chip in arguments.chips:
        for length in arguments.lengths or [CHIPS[chip][1]]:
            for method in arguments.methods:
                for share in arguments.shares:
                    row = measure(chip, method, length, share)
                    print(row, flush=True)
                    rows[chip, method, length, -share] = row
                    report("training/lemo_memory", compared([rows[key] for key in sorted(rows)]), arguments.output)


if __name__ == "__main__":
    main()
