"""Compile every kernel for chips that are not there, at the shapes of known models, by the chips' own compilers.

    python -m benchmarks.kernels_aot                        # every chip, model and pattern: some 20 minutes on 2 cores
    python -m benchmarks.kernels_aot --chips v5e --models gemma-3-4b
    python -m benchmarks.kernels_aot --chips h100 --patterns hopper-full hopper-local hopper-sinks hopper-capped

A kernel that asks for a layout, an alignment or an amount of fast memory that a chip does not have is refused here.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import aot
from benchmarks.common import RESULTS, machine, table
from benchmarks.shapes import SHAPES

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "h100": "h100"}
PATTERNS = ("full", "local", "sinks", "packed", "capped", "alibi", "deep", "float32", "hsa")
CACHES = ("decode", "decode-int8", "decode-int4", "paged")
HOPPER = ("hopper-full", "hopper-local", "hopper-sinks", "hopper-capped")  # for the H100, with JAX 0.12
OUTPUT = RESULTS / "kernels_aot.json"


class Case(NamedTuple):
    """One compile of a forward and backward pass: `pattern` is one of `PATTERNS` or `HOPPER`."""

    chip: str
    model: str
    pattern: str
    length: int


def compile_case(case: Case) -> dict[str, Any]:
    """Seconds, bytes of temporaries and how many of each kernel there are, found by a process of its own.

    Raises:
      RuntimeError: the compiler refused it.
    """
    command = [sys.executable, "-m", "benchmarks.kernels_aot", "--child", *map(str, case)]
    environment = aot.child_environment(CHIPS[case.chip])
    done = subprocess.run(command, env=environment, cwd=aot.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line[:300] for line in done.stderr.splitlines() if "rror" in line and "input ir" not in line]
        raise RuntimeError(f"{'/'.join(map(str, case))}: {(lines or ['no message'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _child(case: Case) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import api
    from pallas_kernels.patterns import Full, Pattern, SinkWindow, SlidingWindow

    config, dtype = SHAPES[case.model], jnp.float32 if case.pattern == "float32" else jnp.bfloat16
    heads, keys, width, length = config.num_heads, config.num_kv_heads, config.head_dim, case.length
    place = SingleDeviceSharding(aot.devices(CHIPS[case.chip])[0])
    platform, implementation = ("cuda", "triton") if case.chip == "h100" else ("tpu", "tpu")

    def array(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    if case.pattern in CACHES:
        _compile(_decode(case, place, implementation), platform)
        return
    if case.pattern == "hsa":
        _compile(_hsa(case, place, implementation), platform)
        return
    if case.pattern in HOPPER:
        _compile(_hopper(case, place), platform)
        return
    windows = {"local": SlidingWindow(1024), "sinks": SinkWindow(4, 1020), "deep": SinkWindow(4, 1020)}
    pattern: Pattern = windows.get(case.pattern, Full())
    known: dict[str, Any] = {"softcap": 50.0} if case.pattern == "capped" else {}

    def step(q: Any, k: Any, v: Any, d_out: Any, more: dict[str, Any]) -> Any:
        def attention(q: Any, k: Any, v: Any) -> Any:
            return api.flash_attention(q, k, v, pattern, implementation=implementation, **known, **more).out

        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(d_out)

    more = {}
    if case.pattern == "packed":
        more["segment_ids"] = array(1, length, dtype=jnp.int32)
    if case.pattern == "alibi":
        more["slopes"] = array(heads, dtype=jnp.float32)
    if case.pattern == "deep":  # a chunk far behind the start, whose place is known when the kernel runs
        more["offset"] = array(dtype=jnp.int32)
    queries = length // 4 if case.pattern == "deep" else length
    arrays = array(1, queries, heads, width), array(1, length, keys, width), array(1, length, keys, width)
    d_out = array(1, queries, heads, width, dtype=jnp.float32)
    _compile(jax.jit(step).trace(*arrays, d_out, more), platform)


def _decode(case: Case, place: Any, implementation: Any) -> Any:
    """One token for 8 streams, whose caches are rings; `paged` reads 32 pages of 64 tokens."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import api

    config, batch = SHAPES[case.model], 8
    stored: Any = {"decode-int8": jnp.int8, "decode-int4": jnp.uint8}.get(case.pattern, jnp.bfloat16)
    width = config.head_dim // (2 if case.pattern == "decode-int4" else 1)

    def array(*shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def step(q: Any, k: Any, v: Any, count: Any, first: Any, scales: dict[str, Any]) -> Any:
        return api.decode_attention(q, k, v, count, first=first, implementation=implementation, **scales)

    cache = array(batch, config.num_kv_heads, case.length, width, dtype=stored)
    scale = array(batch, config.num_kv_heads, case.length, dtype=jnp.float32)
    scales = {} if stored == jnp.bfloat16 else {"k_scale": scale, "v_scale": scale}
    number = array(batch, dtype=jnp.int32)
    q = array(batch, 1, config.num_heads, config.head_dim, dtype=jnp.bfloat16)
    if case.pattern == "paged":

        def paged(q: Any, k: Any, v: Any, pages: Any, count: Any, first: Any) -> Any:
            return api.paged_attention(q, k, v, pages, count, page_size=64, first=first, implementation=implementation)

        pages = array(batch, config.num_kv_heads, 32, dtype=jnp.int32)
        return jax.jit(paged).trace(q, cache, cache, pages, number, number)
    return jax.jit(step).trace(q, cache, cache, number, number, scales)


def _hsa(case: Case, place: Any, implementation: Any) -> Any:
    """A sequence whose tokens each read 8 of its chunks of 64 tokens, forwards and backwards."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import api

    config, length = SHAPES[case.model], case.length

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def step(q: Any, k: Any, v: Any, chosen: Any, weights: Any, d_out: Any) -> Any:
        def attention(q: Any, k: Any, v: Any, weights: Any) -> Any:
            return api.hsa_attention(q, k, v, chosen, weights, implementation=implementation)

        out, pull = jax.vjp(attention, q, k, v, weights)
        return out, pull(d_out)

    heads, keys, width = config.num_heads, config.num_kv_heads, config.head_dim
    chunks, choice = array(1, keys, length // 64, 64, width), (1, keys, length, 8)
    return jax.jit(step).trace(
        array(1, length, heads, width), chunks, chunks, array(*choice, dtype=jnp.int32),
        array(*choice, dtype=jnp.float32), array(1, length, heads, width, dtype=jnp.float32),
    )  # fmt: skip


def _hopper(case: Case, place: Any) -> Any:
    """The Hopper kernel, with an offset that is known when it runs, and the Triton kernels that are its gradients."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

    from pallas_kernels import api
    from pallas_kernels.patterns import Full, Pattern, SinkWindow, SlidingWindow

    config, length = SHAPES[case.model], case.length
    windows: dict[str, Pattern] = {"hopper-local": SlidingWindow(1024), "hopper-sinks": SinkWindow(4, 1020)}
    pattern, softcap = windows.get(case.pattern, Full()), 50.0 if case.pattern == "hopper-capped" else None

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def step(q: Any, k: Any, v: Any, d_out: Any, offset: Any) -> Any:
        def attention(q: Any, k: Any, v: Any) -> Any:
            known: dict[str, Any] = {"softcap": softcap, "implementation": "mosaic_gpu"}
            return api.flash_attention(q, k, v, pattern, offset=offset, **known).out

        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(d_out)

    heads, width = config.num_heads, config.head_dim
    keys, queries = array(1, length, config.num_kv_heads, width), array(1, length, heads, width)
    # JAX 0.12 asks which GPU a Triton kernel is for.
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=gpu)):
        d_out = array(1, length, heads, width, dtype=jnp.float32)
        return jax.jit(step).trace(queries, keys, keys, d_out, array(dtype=jnp.int32))


def _compile(traced: Any, platform: str) -> None:
    """Compile, and print what there is to say."""
    import jax

    start = time.perf_counter()
    lowered = traced.lower(lowering_platforms=(platform,))
    compiled = lowered.compile()
    kernels = "((?:flash|decode|paged|hsa)_[a-z]+(?:_[a-z]+)?)"
    try:
        calls = rf'custom_call_target="(?:tpu_custom_call|mosaic_gpu_v2|__gpu\$xla.gpu.triton)".*?{kernels}'
        names = re.findall(calls, compiled.as_text())
    except jax.errors.JaxRuntimeError:  # JAX cannot read the text of gathers that run on a TPU's sparse cores
        names = re.findall(rf'kernel_name = "{kernels}"', lowered.as_text())
    memory = compiled.memory_analysis()
    print(json.dumps({
        "seconds": round(time.perf_counter() - start, 1), "temp": memory.temp_size_in_bytes, "kernels": Counter(names)
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS + CACHES + HOPPER, default=list(PATTERNS + CACHES))
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        chip, model, pattern, length = arguments.child
        _child(Case(chip, model, pattern, int(length)))
        return
    found = json.loads(arguments.output.read_text())["cases"] if arguments.output.exists() else {}
    refused = []
    for case in [
        Case(c, m, p, arguments.length)
        for c in arguments.chips
        for m in arguments.models
        for p in arguments.patterns
        if c == "h100" or p not in HOPPER
    ]:
        key = "/".join(map(str, case))
        try:
            found[key] = compile_case(case)
        except RuntimeError as error:
            refused.append(str(error))
            print(error, flush=True)
            continue
        print(key, found[key], flush=True)
        body = {"benchmark": "kernels_aot", "machine": machine(), "cases": found}
        arguments.output.write_text(json.dumps(body, indent=1) + "\n")
    print(table([dict(zip(Case._fields, key.split("/"), strict=True), **found[key]) for key in found]))
    if refused:
        sys.exit(f"{len(refused)} refused")


if __name__ == "__main__":
    main()
