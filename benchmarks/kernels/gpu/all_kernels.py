"""Attention kernels on the GPU of this machine: numerics first, then times beside the device's own ceilings.

    python -m benchmarks.kernels.gpu.all_kernels                 # everything; some minutes on an H100
    python -m benchmarks.kernels.gpu.all_kernels --models llama-3.1-8b --lengths 8192
    python -m benchmarks.kernels.gpu.all_kernels --numerics      # time nothing

Needs JAX with CUDA and nothing else; tokamax and torch are compared with where they are installed. Every kernel is
first held against float64 on the device: one that is wrong, or does not compile there, is named and not timed. Times
are of calls that are queued behind each other between two synchronisations, over inputs that take turns so that no call
finds its own in the cache, after warming up; medians, all sides in turn. Ceilings are measured too: the largest TFLOP/s
of a bfloat16 matrix product, and the GB/s of a copy, which is what the kernels of decoding are held against.
`flash.py` has what is done with whole sequences, `chunks.py` chunked backprop, `hsa.py` hierarchical sparse attention,
`decoding.py` caches, `weights.py` weights in four bits. Results are written line by line; without a GPU it says so and
writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.gpu import chunks, decoding, flash, hsa, weights
from benchmarks.kernels.gpu.parts import TOLERANCE, Device, Part, first_line
from benchmarks.model_shapes import SHAPES
from benchmarks.reporting import RESULTS, machine, table
from pallas_kernels.gpu.hopper import attention as hopper_attention

_PARTS: Sequence[Part] = (flash, chunks, hsa, decoding, weights)
PARTS: Mapping[str, Part] = {name: part for part in _PARTS for name in part.NAMES}
DTYPES: Mapping[str, Sequence[Any]] = {"triton": (jnp.bfloat16, jnp.float32), "mosaic_gpu": (jnp.bfloat16,)}
OUTPUT = RESULTS / "kernels/gpu/all_kernels.json"


def has(kernel: str) -> bool:
    """Whether the device can run it: Mosaic GPU's is for Hopper, and for a JAX that has what it is written with."""
    return kernel == "triton" or (
        getattr(jax.devices()[0], "compute_capability", "").startswith("9.") and hopper_attention.available()
    )


def check(model: str, name: str, kernel: str) -> dict[str, float]:
    """Relative errors by dtype; infinite where the kernel cannot run, which is printed."""
    found = {}
    for dtype in DTYPES[kernel]:
        try:
            error = PARTS[name].errors(model, name, kernel, dtype)
        except Exception as problem:
            print(f"{kernel} cannot run {model}, {name}: {first_line(problem)}", flush=True)
            error = math.inf
        found[jnp.dtype(dtype).name] = error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--patterns", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768], help="tokens, at least 4,096")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--numerics", action="store_true", help="check the kernels, time nothing")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if min(arguments.lengths) < 4096:
        parser.error(f"--lengths {min(arguments.lengths)}: chunks and pages need 4,096 tokens or more")
    if jax.default_backend() != "gpu":
        print(f"no GPU here (JAX runs on {jax.default_backend()}): nothing measured, nothing written")
        return
    body: dict[str, Any] = {"benchmark": "kernels/gpu/all_kernels", "machine": machine(), "numerics": {}, "rows": []}

    def write() -> None:
        arguments.output.write_text(json.dumps(body, indent=1) + "\n")

    every = [(model, name) for model in arguments.models for name in arguments.patterns]
    right: dict[tuple[str, str], list[str]] = {pair: [] for pair in every}
    wrong = []
    for model, name in every:
        for kernel in filter(has, PARTS[name].KERNELS):
            found = body["numerics"][f"{model}/{name}/{kernel}"] = check(model, name, kernel)
            good = all(error < TOLERANCE[dtype] for dtype, error in found.items())
            (right[model, name] if good else wrong).append(kernel if good else f"{model}/{name}/{kernel}")
            print(f"{model}, {name}, {kernel}: relative errors {found}{'' if good else ': WRONG'}", flush=True)
            write()
    if not arguments.numerics:
        device = Device.measured(arguments.repeats)
        body["ceilings"] = device.ceilings
        print(f"ceilings of this device: {device.ceilings}", flush=True)
        for (model, name), kernels in right.items():
            for length in arguments.lengths if kernels else []:
                body["rows"] += PARTS[name].measure(model, name, length, kernels, device)
                write()
        for unit in ("TFLOP/s", "GB/s"):
            if some := [row for row in body["rows"] if unit in row]:
                print(table(some))
    if wrong:
        sys.exit(f"wrong results: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
