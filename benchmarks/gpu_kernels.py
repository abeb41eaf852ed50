"""Attention kernels on the GPU of this machine: numerics first, then times beside the device's own ceilings.

    python -m benchmarks.gpu_kernels                 # everything; some minutes on an H100
    python -m benchmarks.gpu_kernels --models llama-3.1-8b --lengths 8192

Needs JAX with CUDA and nothing else; tokamax is compared with where it is installed. Every kernel is first held against
float64 on the device: a kernel that is wrong is not timed. Times are of whole calls between two synchronisations, over
inputs that take turns so that no call finds its own in the cache, after warming up; medians, all sides in turn.
Ceilings are measured too: the largest TFLOP/s of a bfloat16 matrix product, and the GB/s of a copy, which is what the
kernels of decoding are held against (`benchmarks/gpu_decoding.py`; `gpu_hsa.py` has hierarchical sparse attention).
On a Hopper GPU "streamjax mosaic_gpu" is beside "streamjax", which is the Triton kernel: their rows decide which of the
two `platform_implementation` ought to give there. On a machine without a GPU it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_decoding, gpu_hsa
from benchmarks.common import RESULTS, machine, table
from benchmarks.shapes import SHAPES
from pallas_kernels import api, reference
from pallas_kernels.gpu import hopper
from pallas_kernels.patterns import Full, Pattern, SinkWindow, SlidingWindow

PATTERNS: Mapping[str, Pattern] = {
    "causal": Full(),
    "local": SlidingWindow(4096),
    "sinks": SinkWindow(4, 4096),
}
COPIES = 3  # of the inputs, which take turns
OUTPUT = RESULTS / "gpu_kernels.json"
Side = Callable[..., Any]


def pairs(pattern: Pattern, length: int) -> int:
    """Pairs of a query and a key that count."""
    window = pattern.window or length
    full = min(window, length)
    inside = full * (full + 1) // 2 + (length - full) * full
    late = range(window, length)
    return inside + sum(min(pattern.sinks, t - window + 1) for t in late) if pattern.sinks else inside


def inputs(model: str, length: int, seed: int, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    """q, k, v and the output's cotangent."""
    config = SHAPES[model]
    shapes = [(1, length, n, config.head_dim) for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, [*shapes, shapes[0]], strict=True)]


def ours(pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, kernel: Any = "triton") -> jax.Array:
    return api.flash_attention(q, k, v, pattern, implementation=kernel).out.astype(q.dtype)


def hopper_kernel() -> bool:
    """Whether the device is a Hopper GPU, and JAX has what our kernel for these is written with."""
    return getattr(jax.devices()[0], "compute_capability", "").startswith("9.") and hopper.available()


def by_jax(implementation: str, pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    window = pattern.window
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation=implementation)


def by_tokamax(pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    import tokamax

    window = pattern.window
    local = None if window is None else (window - 1, 0)
    found: jax.Array = tokamax.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
    return found


def sides(pattern: Pattern, length: int, mosaic: bool) -> dict[str, Side]:
    """What is timed: ours, the Hopper kernel where `mosaic`, and whoever has the pattern (nobody else has sinks)."""
    found: dict[str, Side] = {"streamjax": partial(ours, pattern)}
    if mosaic:
        found["streamjax mosaic_gpu"] = partial(ours, pattern, kernel="mosaic_gpu")
    if not pattern.sinks:
        found["jax cudnn"] = partial(by_jax, "cudnn", pattern)
        if length <= 8192:  # it holds all logits
            found["jax xla"] = partial(by_jax, "xla", pattern)
        if importlib.util.find_spec("tokamax"):
            found["tokamax"] = partial(by_tokamax, pattern)
    return found


def backward(side: Side, q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
    """Output and gradients."""
    out, pull = jax.vjp(side, q, k, v)
    return out, pull(d_out)


def errors(model: str, pattern: Pattern, kernel: str = "triton", length: int = 1500) -> dict[str, float]:
    """Largest relative error of output and gradients against float64, for the dtypes that the kernel takes."""
    found = {}
    for dtype in (jnp.bfloat16, jnp.float32) if kernel == "triton" else (jnp.bfloat16,):
        arrays = inputs(model, length, 0, dtype)
        mine = jax.jit(partial(backward, partial(ours, pattern, kernel=kernel)))(*arrays)
        with jax.enable_x64(True):
            exact = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
            scale = 1.0 / float(np.sqrt(exact[0].shape[-1]))

            def plain(q: Any, k: Any, v: Any, scale: float = scale) -> Any:
                return reference.flash_attention(q, k, v, pattern, scale=scale).out

            right = jax.jit(partial(backward, plain))(*exact)
            right = [np.asarray(x) for x in jax.tree.leaves(right)]
        each = [
            float(np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b)))
            for a, b in zip(jax.tree.leaves(mine), right, strict=True)
        ]
        found[jnp.dtype(dtype).name] = max(each)
    return found


def seconds(programs: Mapping[str, tuple[Any, list[Any]]], repeats: int) -> dict[str, float]:
    """Median seconds of each program over its inputs, in turn."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, (program, sets) in programs.items():
            arrays = sets[turn % len(sets)]
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def ceilings(repeats: int) -> dict[str, float]:
    """TFLOP/s of a large bfloat16 product, GB/s of a large copy (read and written)."""
    size = 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    x = jnp.zeros(2**29, jnp.bfloat16)
    found = seconds(
        {"product": (jax.jit(jnp.matmul), [(a, b)]), "copy": (jax.jit(lambda x: x + 1), [(x,)])}, max(repeats, 10)
    )
    return {"TFLOP/s": 2 * size**3 / found["product"] / 1e12, "GB/s": 2 * x.nbytes / found["copy"] / 1e9}


def mosaic_errors(model: str, pattern: Pattern) -> dict[str, float]:
    """`errors` of the Hopper kernel; infinite where JAX or the device refuses it."""
    try:
        return errors(model, pattern, "mosaic_gpu")
    except Exception as error:
        print(f"mosaic_gpu does not take {model}, {pattern}: {str(error).splitlines()[0][:160]}", flush=True)
        return {"bfloat16": float("inf")}


def measure(
    model: str, name: str, length: int, repeats: int, peak: float, mosaic: bool = False
) -> list[dict[str, Any]]:
    """A line for each side and direction."""
    pattern, config, lines = PATTERNS[name], SHAPES[model], []
    work = 4 * pairs(pattern, length) * config.num_heads * config.head_dim  # two products forwards, five backwards
    sets = [inputs(model, length, seed) for seed in range(COPIES)]
    for direction, factor in (("forward", 1.0), ("both", 3.5)):
        programs: dict[str, tuple[Any, list[Any]]] = {}
        for label, side in sides(pattern, length, mosaic).items():
            program = jax.jit(side) if direction == "forward" else jax.jit(partial(backward, side))
            arrays = [x[:3] if direction == "forward" else x for x in sets]
            try:
                jax.block_until_ready(program(*arrays[0]))
            except Exception as error:
                print(
                    f"{label} does not take {model}, {name}, {length}: {str(error).splitlines()[0][:160]}", flush=True
                )
                continue
            programs[label] = program, arrays
        found = seconds(programs, repeats)
        for label, median in found.items():
            rate = factor * work / median / 1e12
            lines.append({
                "model": model, "pattern": name, "tokens": length, "direction": direction, "side": label,
                "ms": median * 1e3, "TFLOP/s": rate, "of the ceiling": rate / peak,
                "ours / this": found.get("streamjax", float("nan")) / median,
            })  # fmt: skip
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in lines[-1].items()}, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    known = [*PATTERNS, gpu_hsa.HSA, *gpu_decoding.CACHES]
    parser.add_argument("--patterns", nargs="+", choices=known, default=known)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768], help="tokens")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        print(f"no GPU here (JAX runs on {jax.default_backend()}): nothing measured, nothing written")
        return
    body: dict[str, Any] = {"benchmark": "gpu_kernels", "machine": machine(), "numerics": {}, "rows": []}
    wrong, mosaic = [], []
    for model in arguments.models:
        for name in arguments.patterns:
            if name in PATTERNS and hopper_kernel():
                found = body["numerics"][f"{model}/{name}/mosaic_gpu"] = mosaic_errors(model, PATTERNS[name])
                right = found["bfloat16"] < 1e-2
                (mosaic if right else wrong).append((model, name, "mosaic_gpu"))
                print(f"{model}, {name}, mosaic_gpu: relative errors {found}{'' if right else ': WRONG'}", flush=True)
            if name == gpu_hsa.HSA:
                found = gpu_hsa.errors(model)
            else:
                found = gpu_decoding.errors(model, name) if name not in PATTERNS else errors(model, PATTERNS[name])
            body["numerics"][f"{model}/{name}"] = found
            right = found["bfloat16"] < 1e-2 and found["float32"] < 1e-5
            wrong += [] if right else [(model, name)]
            print(f"{model}, {name}: relative errors {found}{'' if right else ': WRONG'}", flush=True)
    body["ceilings"] = ceilings(arguments.repeats)
    print(f"ceilings of this device: {body['ceilings']}", flush=True)
    for model in arguments.models:
        for name in arguments.patterns:
            for length in arguments.lengths if (model, name) not in wrong else []:
                timed = partial(seconds, repeats=arguments.repeats)
                if name in PATTERNS:
                    peak, beside = body["ceilings"]["TFLOP/s"], (model, name, "mosaic_gpu") in mosaic
                    rows = measure(model, name, length, arguments.repeats, peak, beside)
                elif name == gpu_hsa.HSA:
                    rows = gpu_hsa.measure(model, length, body["ceilings"]["TFLOP/s"], timed)
                else:
                    rows = gpu_decoding.measure(model, name, length, body["ceilings"]["GB/s"], timed)
                body["rows"] += rows
                arguments.output.write_text(json.dumps(body, indent=1) + "\n")
    for unit in ("TFLOP/s", "GB/s"):
        if some := [row for row in body["rows"] if unit in row]:
            print(table(some))
    if wrong:
        sys.exit(f"wrong results: {wrong}")


if __name__ == "__main__":
    main()
