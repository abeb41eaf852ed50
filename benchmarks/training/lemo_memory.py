"""LeMo's memory: one gradient where layers compute a share of their tokens, compiled ahead of time for one chip.

    python -m benchmarks.training.lemo_memory            # half an hour on 2 quiet cores
    python -m benchmarks.training.lemo_memory --chips v5e --lengths 8192

Qwen2.5-0.5B, bf16 parameters and gradients, layers stacked, attention by kernels; every layer has the same share.
`full` keeps all activations, `remat` layers' inputs. `temporaries GB` is what the compiler assigns beside parameters
and gradients, or, where the program does not fit, what it says that all needs.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.backprop.compile_case import Case, compile_case
from benchmarks.model_shapes import SHAPES
from benchmarks.reporting import report

SHARES = (1.0, 0.7, 0.5)
CHIPS = {"v5e": ("v5e:1x1", 16384), "v5p": ("v5p:2x2x1", 32768)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row; by default one for each chip")
    parser.add_argument("--methods", nargs="+", choices=("full", "remat"), default=["full", "remat"])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for chip in arguments.chips:
        topology, usual = CHIPS[chip]
        for length in arguments.lengths or [usual]:
            for method in arguments.methods:
                for share in SHARES:
                    shares = None if share == 1 else (share,)
                    case = Case(
                        SHAPES["qwen2.5-0.5b"], topology, length, {"method": method}, kernels=True, shares=shares
                    )
                    found = compile_case(case)
                    row = {"chip": chip, "method": method, "tokens": length, "share": share}
                    needed = found.get("temp", found["peak"]) / 1e9
                    rows.append({**row, "temporaries GB": needed, "fits": found["fits"]})
                    print(rows[-1], flush=True)
    report("training/lemo_memory", rows)


if __name__ == "__main__":
    main()
