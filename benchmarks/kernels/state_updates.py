"""Bytes that one token moves for the states of recurrent layers, on TPUs and an H100, compiled ahead of time.

    python -m benchmarks.kernels.state_updates       # a minute; no TPU or GPU is needed

A layer's update for 16 streams, at the shapes of Qwen3-Next 80B (Gated DeltaNet), Kimi-Linear 48B (a decay for each
channel) and Mamba-2 2.7B. What a program's text moves to and from main memory (`benchmarks.hbm_traffic`), over the
bytes of the states: 2 is each state read once and written once. `product` reads what states hold under queries and keys
by a product of matrices, before it changes them; `as used` is the form that streams take there: with the delta rule a
kernel, `api.delta_update`, and else a sum over the new state, of which and of the update the compiler makes one pass.
What a kernel is given counts once: no two of its programs read the same part of a state. On an H100 all that goes from
one kernel to the next counts as main memory's, what its cache keeps too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, TypeAlias

from benchmarks import aot
from benchmarks.reporting import report

TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "h100": "h100"}
Shape: TypeAlias = tuple[int, int, int, int, bool, bool]
# Groups, heads of a group, rows and columns of a state, a decay for each row, the delta rule.
MODELS: dict[str, Shape] = {
    "Qwen3-Next 80B": (16, 2, 128, 128, False, True),
    "Kimi-Linear 48B": (32, 1, 128, 128, True, True),
    "Mamba-2 2.7B": (1, 80, 128, 64, False, False),
}
STREAMS = 16
FORMS = ("product", "as used")


def program(chip: str, model: str, form: str) -> tuple[str, int]:
    """The compiled program's text, and the bytes of the states; for a process of `aot.child_environment`."""
    from jax.sharding import SingleDeviceSharding

    place = SingleDeviceSharding(aot.devices(TOPOLOGIES[chip])[0])
    traced = trace(chip, MODELS[model], place, form)
    platform = "tpu" if TOPOLOGIES[chip].startswith("v") else "cuda"
    groups, shared, rows, columns, _, _ = MODELS[model]
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
    return compiled.as_text(), STREAMS * groups * shared * rows * columns * 4


def trace(chip: str, shape: Shape, place: Any, form: str = "as used") -> Any:
    """The update at a layer's shape, traced; for a process of `aot.child_environment`."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.api import platforms
    from streamjax.attention.recurrent import recurrence

    groups, shared, rows, columns, channels, delta = shape

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((STREAMS, *shape), jnp.float32, sharding=place)

    def update(q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any) -> Any:
        return recurrence(q, k, v, decay, state, beta=beta)

    tpu = TOPOLOGIES[chip].startswith("v")
    if form == "as used":
        platforms.platform_implementation = lambda: "tpu" if tpu else "triton"
    pair, heads, state = (1, groups, rows), (1, groups, shared), array(groups * shared, rows, columns)
    given = array(*pair), array(*pair), array(*heads, columns), array(*heads, *([rows] if channels else []))
    return jax.jit(update, donate_argnums=5).trace(*given, array(*heads) if delta else None, state)


def moved(chip: str, model: str, form: str) -> float:
    """Bytes moved over bytes of the states; for a process of `aot.child_environment`."""
    from benchmarks.hbm_traffic import moved_bytes

    text, size = program(chip, model, form)
    return round(moved_bytes(text) / size, 2)


def main() -> None:
    rows = []
    for chip, topology in TOPOLOGIES.items():
        command = [sys.executable, "-m", "benchmarks.kernels.state_updates", "--child", chip]
        environment = aot.child_environment(topology)
        done = subprocess.run(command, env=environment, cwd=aot.ROOT, capture_output=True, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    report("kernels/state_updates", rows)


def _child(chip: str) -> None:
    # All models in one form before the other: the second is asked for by saying that JAX runs on a TPU.
    found = {form: {model: moved(chip, model, form) for model in MODELS} for form in FORMS}
    print(
        json.dumps([{"chip": chip, "model": model, **{form: found[form][model] for form in FORMS}} for model in MODELS])
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2])
    else:
        os.chdir(aot.ROOT)
        main()
