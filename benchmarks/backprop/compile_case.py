"""Memory of one gradient step on one chip that is not there, by the chip's own compiler: `compile_case`.

No weight is ever made. A case is lowered and compiled in a fresh process (see `aot.py`) from a tree of shapes, and its
figures are the compiler's buffer assignment. This module is that process's program, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

import streamjax as sj
from benchmarks import aot
from benchmarks.estimated_cycles import estimate
from pallas_kernels.api import platforms
from streamjax.field_checks import from_plain
from streamjax.models import ModelConfig
from streamjax.training.backprop.head.passes import KERNEL_BLOCK
from streamjax.training.elimination.kept_tokens import TokenElimination
from streamjax.training.elimination.predictors import draw_predictor

FULL_LOGITS = {"method": "full_logits"}  # the first baseline, which this module has itself; all else is the library's
_SOURCES = ("streamjax/attention", "streamjax/kv", "streamjax/models", "streamjax/parallel", "streamjax/training")


@dataclasses.dataclass(frozen=True)
class Case:
    """One gradient step: bf16 parameters and gradients, layers stacked, `batch` sequences of `length` tokens.

    `arguments` are those of `sj.training.loss_and_grad` (`method`, `chunk_size`, ...), or `FULL_LOGITS`. `topology` is
    one of `aot.TOPOLOGIES`, of which one chip is used. `kernels`: attention by the chip's kernels, not by XLA's loops.
    `shares`: of their blocks of 64 tokens that layers compute (LeMo), one for all layers or one each; all where None.
    """

    config: sj.UniformConfig | ModelConfig
    topology: str
    length: int
    arguments: Mapping[str, Any]
    batch: int = 1
    kernels: bool = False
    shares: tuple[float, ...] | None = None

    def to_json(self) -> str:
        flat = isinstance(self.config, sj.UniformConfig)
        config = dataclasses.asdict(self.config) if flat else self.config.to_json_dict()
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({**fields, "arguments": dict(self.arguments), "config": config})

    @classmethod
    def from_json(cls, text: str) -> Case:
        values = json.loads(text)
        flat = "num_layers" in values["config"]
        read = partial(from_plain, sj.UniformConfig) if flat else ModelConfig.from_json_dict
        return cls(**{**values, "config": read(values["config"])})


@cache
def source() -> str:
    """A hash of everything that a case's figures come from: the library's source and the versions of the compilers."""
    digest = hashlib.sha256()
    files = [path for folder in (*_SOURCES, "pallas_kernels") for path in (aot.ROOT / folder).rglob("*.py")]
    for path in [*sorted(files), aot.ROOT / "benchmarks" / "backprop_compile.py", aot.H100]:
        digest.update(path.read_bytes())
    versions = [path.name for folder in aot.LIBRARIES.values() for path in sorted(folder.glob("*.dist-info"))]
    digest.update(" ".join([jax.__version__, *versions]).encode())
    return digest.hexdigest()[:16]


def compile_case(
    case: Case, known: str | None = None, *, until_assigned: bool = False, schedules: Path | None = None
) -> dict[str, Any]:
    """Compile a case in a fresh process.

    Args:
      case: what to compile.
      known: a `program` of earlier figures; where the case still lowers to it, nothing is compiled.
      until_assigned: end the compiler once every buffer has its place, before it makes code: `fits` and `peak` alone.
      schedules: a folder, into which a TPU's compiler writes the schedules of kernels.

    Returns:
      `fits`, whether the chip's memory holds it; `program`, a hash of the lowered program; `compile_s`; and in bytes
      `argument`, `output`, `alias`, `temp` and `code` on the chip, the first four as `host_*` in pinned host memory,
      and `peak` = argument + output - alias + temp. Where the compiler refuses a program that does not fit, only
      `peak` is there, as its message rounds it. Where the program is `known`, `program` alone. With kernels, also
      `kernels`, how many calls of them there are. With `schedules`, of a program that fits also what
      `benchmarks.estimated_cycles` reads: `cycles`, and `runs` of each kernel.

    Raises:
      ValueError: no compiler for the topology.
      RuntimeError: the compile failed for another reason; the message is the process's last line.
    """
    if until_assigned:
        command = [sys.executable, "-m", "benchmarks.backprop.compile_case", ""]
        ended = aot.end_when_assigned(command, _environment(case), case.to_json())
        if ended.found is None and not ended.printed:
            raise RuntimeError(f"{case.topology}, {case.length} tokens: {ended.errors.strip().splitlines()[-1]}")
        peak = json.loads(ended.printed[-1])["peak"] if ended.found is None else ended.found[1]["default"]
        return {"fits": peak <= aot.TOPOLOGIES[case.topology].memory_bytes, "peak": peak}
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.backprop.compile_case", known or "", *(["cycles"] if schedules else [])],
        input=case.to_json(),
        cwd=aot.ROOT,
        env=_environment(case) | ({"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={schedules} {_FLAGS}"} if schedules else {}),
        capture_output=True,
        text=True,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise RuntimeError(f"{case.topology}, {case.length} tokens, {dict(case.arguments)}: {lines[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


_FLAGS = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"


def _environment(case: Case) -> dict[str, str]:
    return {**aot.child_environment(case.topology), "JAX_TRACEBACK_FILTERING": "remove_frames"}


def _compile_here(case: Case, known: str, with_cycles: bool = False) -> dict[str, Any]:
    if case.kernels:  # JAX runs on a CPU here
        platforms.platform_implementation = lambda: (
            "tpu" if aot.TOPOLOGIES[case.topology].platform == "tpu" else "triton"
        )
    placement = jax.sharding.SingleDeviceSharding(aot.devices(case.topology)[0])
    place = partial(jax.ShapeDtypeStruct, sharding=placement)
    model = jax.eval_shape(
        lambda: sj.Decoder(case.config, jax.random.key(0), dtype=jnp.bfloat16, scan_layers=True),
    )
    model = jax.tree.map(lambda leaf: place(leaf.shape, leaf.dtype), model)
    shape = (case.batch, case.length)
    batch = {"tokens": place(shape, jnp.int32), "targets": place(shape, jnp.int32)}
    batch["weights"] = place(shape, jnp.float32)
    step = full_logits if case.arguments == FULL_LOGITS else partial(sj.training.loss_and_grad, **case.arguments)
    if case.shares is not None:
        step, model = _with_elimination(step, case.shares, model, place)
    lowered = jax.jit(step).trace(model, batch).lower(lowering_platforms=(aot.TOPOLOGIES[case.topology].platform,))
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
    if program == known:
        return {"program": program}
    start = time.perf_counter()
    try:
        if os.environ.get(aot.DUMP):
            aot.compile_until_assigned(lowered)
        compiled, text = aot.compiled_with_text(lowered) if with_cycles else (lowered.compile(), "")
        figures = _figures(compiled, aot.TOPOLOGIES[case.topology].memory_bytes)
        if case.kernels:
            figures["kernels"] = len(re.findall(r"@(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)\b", lowered.as_text()))
        if with_cycles:
            pieces = -(-case.length // max(1, KERNEL_BLOCK // case.batch))  # of the loss: as many as have tokens
            read = estimate(text, turns=pieces)
            figures |= {"cycles": read.cycles, "runs": dict(read.kernels)}
    except jax.errors.JaxRuntimeError as error:
        wanted = aot.wanted_bytes(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or wanted is None:
            raise
        figures = {"fits": False, "peak": wanted}
    return {**figures, "program": program, "compile_s": round(time.perf_counter() - start, 1)}


def _with_elimination(step: Callable, shares: Sequence[float], model: Any, place: Callable) -> tuple[Callable, Any]:
    """`step` of a pair, a model and predictors, and that pair."""
    config = model.config
    drawn = jax.eval_shape(lambda: draw_predictor(np.random.default_rng(0), config.d_model, 64, 16))
    stack = jax.tree.map(lambda leaf: place((config.num_layers, *leaf.shape), leaf.dtype), drawn)
    shares = tuple(shares) if len(shares) > 1 else (*shares,) * config.num_layers
    both = model, TokenElimination((stack,), (), shares, 64)
    return lambda both, batch: step(both[0], batch, elimination=both[1]), both


def _figures(compiled: Any, memory_bytes: int) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    kinds = ("argument", "output", "alias", "temp")
    chip = {kind: getattr(memory, f"{kind}_size_in_bytes") for kind in kinds}
    host = {f"host_{kind}": getattr(memory, f"host_{kind}_size_in_bytes") for kind in kinds}
    code = memory.generated_code_size_in_bytes
    peak = chip["argument"] + chip["output"] - chip["alias"] + chip["temp"]
    return {"fits": peak + code <= memory_bytes, "peak": peak, **chip, "code": code, **host}


def full_logits(model: sj.Decoder, batch: Mapping[str, Array]) -> tuple[Float[Array, ""], sj.Decoder]:
    """The first baseline: every layer's input is kept, and the logits of the whole sequence, once, in float32."""

    def mean(model: sj.Decoder) -> Float[Array, ""]:
        logits = model.logits(model.hidden(batch["tokens"], remat=True))
        return jnp.sum(_nll(logits, batch["targets"]) * batch["weights"]) / jnp.sum(batch["weights"])

    return jax.value_and_grad(mean)(model)


@jax.custom_vjp
def _nll(logits: Float[Array, "B T V"], targets: Int32[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross-entropy whose backward pass keeps the logits alone; JAX by itself would keep their exponentials as well."""
    return _nll_forward(logits, targets)[0]


def _nll_forward(logits: Array, targets: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], (logits, lse, targets)


def _nll_backward(saved: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, None]:
    logits, lse, targets = saved
    hit = targets[..., None] == jnp.arange(logits.shape[-1])
    return (jnp.exp(logits - lse[..., None]) - hit) * cotangent[..., None], None


_nll.defvjp(_nll_forward, _nll_backward)


if __name__ == "__main__":
    print(json.dumps(_compile_here(Case.from_json(sys.stdin.read()), sys.argv[1], "cycles" in sys.argv)))
