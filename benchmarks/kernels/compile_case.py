"""Compile one kernel's program for a chip that is not there, and read what the chip's compiler says: `compile_case`.

Figures are the compilers' own: temporaries from the buffer assignment; a TPU kernel's fast memory from the compiled
program, its spilled registers from a report that libtpu writes; a GPU kernel's shared memory and threads from the
launches that XLA wrote down, registers, spills and inner loops from NVIDIA's tools over the PTX that it made. This
module is the program of the process that compiles, too.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh

from benchmarks import aot, model_shapes
from benchmarks.kernels.gpu import machine_code
from benchmarks.kernels.gpu.machine_code import KERNELS
from benchmarks.model_shapes import SHAPES
from pallas_kernels import api
from pallas_kernels.patterns import Full, Pattern, SinkWindow, SlidingWindow

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "h100": "h100"}
PATTERNS = ("full", "local", "sinks", "packed", "capped", "alibi", "deep", "float32", "chunk", "hsa")
CACHES = (
    "decode",
    "decode-int8",
    "decode-int4",
    "decode-codes",
    "paged",
    "paged-codes",
    "pool",
    "pool-shared",
    "scores",
)
TPU_ONLY = ("tokens",)  # the loss of a chunk
HOPPER = ("hopper-full", "hopper-local", "hopper-sinks", "hopper-capped")  # for the H100, with JAX 0.11.2 or later
WINDOWS: dict[str, Pattern] = {"local": SlidingWindow(1024), "sinks": SinkWindow(4, 1020), "deep": SinkWindow(4, 1020)}
WINDOWS |= {"hopper-local": WINDOWS["local"], "hopper-sinks": WINDOWS["sinks"]}
_CALL = r'custom_call_target="(?:tpu_custom_call|mosaic_gpu_v2|__gpu\$xla.gpu.triton)"'
_VMEM = r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"\d+","size":"(\d+)"}'


class Case(NamedTuple):
    """One compile: `pattern` is one of the names above; of `CACHES` one token for 8 streams, of others both passes."""

    chip: str
    model: str
    pattern: str
    length: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


@cache
def source(chip: str) -> str:
    """A hash of all that a chip's figures come from: the kernels, this file, the versions of the compilers."""
    other = "tpu" if chip == "h100" else "gpu"
    files = [path for path in (aot.ROOT / "pallas_kernels").rglob("*.py") if other not in path.parts]
    digest = hashlib.sha256()
    for path in [*sorted(files), Path(__file__), Path(model_shapes.__file__), aot.H100]:
        digest.update(path.read_bytes())
    digest.update(_versions(chip).encode())
    return digest.hexdigest()[:16]


def compile_case(case: Case, known: str | None = None, spills: bool = False) -> dict[str, Any]:
    """Compile a case in a process of its own.

    Args:
      case: what to compile.
      known: a `program` of earlier figures; where the case still is that program, nothing is compiled.
      spills: ask the TPU's compiler for its report, with which it takes ten times as long.

    Returns:
      `program`, a hash of the traced program, alone where it is `known`; else also `seconds`, `temp`, bytes of
      temporaries, and `kernels`, for each the number of its calls, `count`, and what its compiler says: on TPUs `vmem`
      and, if asked for, `vmem_spills` in bytes; on GPUs `threads` and `shared` bytes, and where there are the tools
      `registers`, `spills`, bytes stored and loaded, and `loop`, the inner loop that has most products for its
      instructions (`gpu_code.Loop`).

    Raises:
      ValueError: no compiler for the chip.
      RuntimeError: the compiler refused it.
      OSError: the process was ended by a signal, for want of memory or by a person: nothing is known.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = aot.child_environment(CHIPS[case.chip])
        if case.chip == "h100":
            environment |= {"XLA_FLAGS": f"--xla_dump_to={folder}", "MOSAIC_GPU_DUMP_TO": folder}
        elif spills:
            report = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=vmem_report"
            environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} {report}"
        command = [sys.executable, "-m", "benchmarks.kernels.compile_case", *map(str, case), known or ""]
        done = subprocess.run(command, env=environment, cwd=aot.ROOT, capture_output=True, text=True, check=False)
        if done.returncode < 0:
            raise OSError(f"{case}: ended by signal {-done.returncode}")
        if done.returncode:
            lines = [line[:300] for line in done.stderr.splitlines() if "rror" in line and "input ir" not in line]
            raise RuntimeError(f"{case}: {(lines or ['no message'])[-1]}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        more = machine_code.figures(Path(folder)) if case.chip == "h100" else _vmem(Path(folder))
        for kernel, figures in found.get("kernels", {}).items():
            figures.update(more.get(kernel, {}))
        unknown = case.chip != "h100" and not all("vmem" in figures for figures in found.get("kernels", {}).values())
        return compile_case(case, spills=True) if unknown and not spills else found


def _vmem(folder: Path) -> dict[str, dict[str, int]]:
    """Of each kernel, its windows and scratch in fast memory, and the registers that were spilled there; the most."""
    found: dict[str, dict[str, int]] = {}
    for path in folder.glob("*vmem_report.html"):
        text = path.read_text()
        data, _ = json.JSONDecoder().raw_decode(text, text.index("{", text.index("const DATA")))
        for name, usage in data["hlo_breakdowns"].items():
            kernel = re.search(KERNELS, name)
            if kernel is None:
                continue
            parts = [part for block in usage["blocks"] for part in block["allocations"]]
            spills = sum(part["size"] for part in parts if part["tag"] == "SPILL")
            now = {"vmem": usage["total_size"], "vmem_spills": spills}
            found[kernel[1]] = max(found.get(kernel[1], now), now, key=lambda figures: figures["vmem"])
    return found


def _versions(chip: str) -> str:
    folder = aot.LIBRARIES["cuda" if chip == "h100" else "tpu"]
    found = [jax.__version__, *sorted(path.name for path in folder.glob("*.dist-info"))]
    if chip == "h100":
        found += machine_code.versions()
    return " ".join(found)


def _trace(case: Case) -> Any:
    """The case's program, traced."""
    place = SingleDeviceSharding(aot.devices(CHIPS[case.chip])[0])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    known = {"scores": _scores, "chunk": _chunk, "hsa": _hsa, "tokens": _tokens, **dict.fromkeys(HOPPER, _hopper)}
    make = known.get(case.pattern, _decode if case.pattern in CACHES else _flash)
    if case.chip != "h100":
        return make(case, array, "tpu")
    # JAX from 0.11 on asks which GPU a Triton kernel is for.
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=gpu)):
        return make(case, array, "mosaic_gpu" if case.pattern in HOPPER else "triton")


def _flash(case: Case, array: Any, implementation: Any) -> Any:
    """A sequence, forwards and backwards."""
    config, length, dtype = SHAPES[case.model], case.length, jnp.float32 if case.pattern == "float32" else jnp.bfloat16
    heads, keys, width = config.num_heads, config.num_kv_heads, config.head_dim
    pattern: Pattern = WINDOWS.get(case.pattern, Full())
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
    queries, read = length // 4 if case.pattern == "deep" else length, array(1, length, keys, width, dtype=dtype)
    q = array(1, queries, heads, width, dtype=dtype)
    return jax.jit(step).trace(q, read, read, array(*q.shape, dtype=jnp.float32), more)


def _decode(case: Case, array: Any, implementation: Any) -> Any:
    """One token for 8 streams, whose caches are rings; `paged` reads 32 pages of 64 tokens, `pool` those of a pool that
    has as many as fill all rings, `pool-shared` those that the streams have in common. `codes` are of four bits, with a
    least and a step for 64 numbers."""
    config, batch = SHAPES[case.model], 8
    stored: Any = {"decode-int8": jnp.int8, "decode-int4": jnp.uint8}.get(case.pattern, jnp.bfloat16)
    width = config.head_dim // (2 if case.pattern == "decode-int4" else 1)

    def step(q: Any, k: Any, v: Any, count: Any, first: Any, scales: dict[str, Any]) -> Any:
        return api.decode_attention(q, k, v, count, first=first, implementation=implementation, **scales)

    def paged(q: Any, k: Any, v: Any, pages: Any, count: Any, first: Any) -> Any:
        return api.paged_attention(q, k, v, pages, count, page_size=64, first=first, implementation=implementation)

    def codes(along: Any, slots: int, runs: int) -> Any:
        whole = array(batch, config.num_kv_heads, case.length // 2, width, dtype=jnp.uint8)
        numbers = array(batch, config.num_kv_heads, case.length // slots, runs)
        return api.Coded(whole, numbers, numbers, bits=4, group=64, along=along)

    def pool(q: Any, k: Any, v: Any, pages: Any, count: Any) -> Any:
        return api.pool_attention(q, k, v, pages, count, implementation=implementation)

    cache: Any = (array(batch, config.num_kv_heads, case.length, width, dtype=stored),) * 2
    if case.pattern.endswith("codes"):
        cache = codes("channel", 64, width), codes("token", 1, width // 64)
    number = array(batch, dtype=jnp.int32)
    q = array(batch, 1, config.num_heads, config.head_dim)

    def shared(q: Any, k: Any, v: Any, pages: Any, readers: Any) -> Any:
        return api.shared_pool_attention(q, k, v, pages, readers, implementation=implementation)

    if case.pattern.startswith("pool"):
        cache = (array(config.num_kv_heads, batch * case.length // 64, 64, width),) * 2
        if case.pattern == "pool-shared":
            pages, readers = array(case.length // 64, dtype=jnp.int32), array(case.length // 64, batch, dtype=jnp.bool_)
            return jax.jit(shared).trace(q, *cache, pages, readers)
        return jax.jit(pool).trace(q, *cache, array(batch, case.length // 64, dtype=jnp.int32), number)
    if case.pattern.startswith("paged"):
        pages = array(batch, config.num_kv_heads, 32, dtype=jnp.int32)
        return jax.jit(paged).trace(q, *cache, pages, number, number)
    scale = array(batch, config.num_kv_heads, case.length, dtype=jnp.float32)
    scales = {} if stored == jnp.bfloat16 else {"k_scale": scale, "v_scale": scale}
    return jax.jit(step).trace(q, *cache, number, number, scales)


def _scores(case: Case, array: Any, implementation: Any) -> Any:
    """One token for 8 streams that scores all pages of 64 tokens by bounds, each page in 2 parts."""
    config, batch = SHAPES[case.model], 8
    heads, pages, width = config.num_kv_heads, case.length // 64, config.head_dim

    def step(q: Any, summary: Any, some: Any) -> Any:
        return api.page_scores(q, summary, some, bounds=True, parts=2, implementation=implementation)

    summary, some = array(batch, heads, pages, 4 * width), array(batch, heads, pages, 2, dtype=jnp.bool_)
    return jax.jit(step).trace(array(batch, 1, config.num_heads, width), summary, some)


def _chunk(case: Case, array: Any, implementation: Any) -> Any:
    """A chunk of 2,048 tokens over a sequence's keys in one of 4 rows of a buffer; gradients of keys in float32."""
    config, chunk = SHAPES[case.model], 2048
    q = array(1, chunk, config.num_heads, config.head_dim)
    shape = (4, 1, config.num_kv_heads, case.length, config.head_dim)

    def step(q: Any, k: Any, v: Any, d_out: Any, d_k: Any, d_v: Any, offset: Any, row: Any) -> Any:
        known: dict[str, Any] = {"offset": offset, "row": row, "implementation": implementation}
        part = api.chunk_attention(q, k, v, Full(), **known)
        return part.out, *api.chunk_gradients(q, k, v, Full(), part, d_out, d_k, d_v, **known)

    buffer, sums, number = array(*shape), array(*shape, dtype=jnp.float32), array(dtype=jnp.int32)
    d_out = array(*q.shape, dtype=jnp.float32)
    return jax.jit(step, donate_argnums=(4, 5)).trace(q, buffer, buffer, d_out, sums, sums, number, number)


def _tokens(case: Case, array: Any, implementation: Any) -> Any:
    """What a loss reads of the logits of 2,048 tokens, and gradients; the output matrix's in float32."""
    config, tokens = SHAPES[case.model], 2048
    known = {"vocab_axis": 0 if config.tie_embeddings else 1, "implementation": implementation}

    def step(x: Any, w: Any, targets: Any, slopes: Any, d_w: Any) -> Any:
        stats = api.token_stats(x, w, targets, **known)
        return stats, *api.token_stats_gradients(x, w, targets, stats.lse, api.LogitStats(*slopes), d_w, **known)

    shape = (config.vocab_size, config.d_model)[:: 1 if config.tie_embeddings else -1]
    each = array(tokens, dtype=jnp.float32)
    return jax.jit(step, donate_argnums=(4,)).trace(
        array(tokens, config.d_model), array(*shape), array(tokens, dtype=jnp.int32), (each,) * 3,
        array(*shape, dtype=jnp.float32),
    )  # fmt: skip


def _hsa(case: Case, array: Any, implementation: Any) -> Any:
    """A sequence whose tokens each read 8 of its chunks of 64 tokens, forwards and backwards."""
    config, length = SHAPES[case.model], case.length

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


def _hopper(case: Case, array: Any, implementation: Any) -> Any:
    """The Hopper kernel, with an offset that is known when it runs, and the Triton kernels that are its gradients."""
    config, length, pattern = SHAPES[case.model], case.length, WINDOWS.get(case.pattern, Full())
    known: dict[str, Any] = {"softcap": 50.0 if case.pattern == "hopper-capped" else None}

    def step(q: Any, k: Any, v: Any, d_out: Any, offset: Any) -> Any:
        def attention(q: Any, k: Any, v: Any) -> Any:
            return api.flash_attention(q, k, v, pattern, offset=offset, implementation=implementation, **known).out

        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(d_out)

    keys, q = (array(1, length, heads, config.head_dim) for heads in (config.num_kv_heads, config.num_heads))
    return jax.jit(step).trace(q, keys, keys, array(*q.shape, dtype=jnp.float32), array(dtype=jnp.int32))


def _compile_here(case: Case, known: str) -> dict[str, Any]:
    traced = _trace(case)
    text = re.sub(r" at \S+:\d+|0x[0-9a-f]+", "", str(traced.jaxpr))  # without places in files and in memory
    digest = hashlib.sha256(f"{case.chip} {_versions(case.chip)} {text}".encode())
    for constant in traced.jaxpr.consts:
        digest.update(np.asarray(constant).tobytes())
    program = digest.hexdigest()[:16]
    if program == known:
        return {"program": program}
    start = time.perf_counter()
    lowered = traced.lower(lowering_platforms=("cuda" if case.chip == "h100" else "tpu",))
    compiled = lowered.compile()
    vmem: dict[str, int] = {}
    try:
        text = compiled.as_text()
        names = re.findall(rf"{_CALL}.*?{KERNELS}", text)
        for name, size in re.findall(rf"{_CALL}.*?{KERNELS}.*?{_VMEM}", text):
            vmem[name] = max(vmem.get(name, 0), int(size))
    except jax.errors.JaxRuntimeError:  # JAX cannot read the text of gathers that run on a TPU's sparse cores
        names = re.findall(rf'kernel_name = "{KERNELS}"', lowered.as_text())
    kernels = {name: {"count": names.count(name)} for name in dict.fromkeys(names)}
    for name, size in vmem.items():
        kernels[name]["vmem"] = size
    return {
        "program": program,
        "seconds": round(time.perf_counter() - start, 1),
        "temp": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": kernels,
    }


if __name__ == "__main__":
    chip, model, pattern, length, known = sys.argv[1:]
    print(json.dumps(_compile_here(Case(chip, model, pattern, int(length)), known)))
