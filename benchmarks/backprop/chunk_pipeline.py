"""The chunk order as a pipeline over the mesh axis `context`: how long its devices idle, and what they hold.

    python -m benchmarks.backprop.chunk_pipeline

Llama-3.1-8B, all layers, one sequence, backprop chunks of 2,048 tokens. `ticks` is how many chunk's times one way
through the stages takes, counted on a schedule in which a chunk goes on to the next device once it is through and
that device is free; both ways take as many. `idle` is the share of them that a device has nothing to do. The other
columns are GB of one device, by sizes alone: `keys` of its layers for all tokens in bfloat16, `gradients` of these in
float32, `inputs` of its first layer for all tokens, and what `remat` keeps instead, the `inputs of layers` for its
stretch.
"""

from __future__ import annotations

from typing import Any

from benchmarks.model_shapes import SHAPES
from benchmarks.reporting import report
from streamjax.training.backprop.planning.memory_model import DEFAULT_CHUNK

LENGTHS = (2**15, 2**17, 2**20)
DEVICES = (2, 4, 8, 16, 32)


def schedule(chunks: int, stages: int) -> list[list[int | None]]:
    """For each tick, the chunk that each stage works on; None where it idles.

    Example:
      >>> schedule(2, 3)
      [[0, None, None], [1, 0, None], [None, 1, 0], [None, None, 1]]
    """
    waiting = [list(range(chunks)), *([] for _ in range(stages - 1))]
    through, found = 0, []
    while through < chunks:
        now = [queue.pop(0) if queue else None for queue in waiting]
        found.append(now)
        for stage, chunk in enumerate(now):
            if chunk is not None and stage + 1 < stages:
                waiting[stage + 1].append(chunk)
        through += now[-1] is not None
    return found


def rows() -> list[dict[str, Any]]:
    config, found = SHAPES["llama-3.1-8b"], []
    for length in LENGTHS:
        for devices in DEVICES:
            chunks = length // DEFAULT_CHUNK
            plan = schedule(chunks, devices)
            idle = sum(chunk is None for now in plan for chunk in now) / (len(plan) * devices)
            keys = 2 * config.num_kv_heads * config.head_dim * length * config.num_layers // devices
            states = config.d_model * length
            found.append(
                {
                    "tokens": f"{length:,}",
                    "devices": devices,
                    "chunks": chunks,
                    "ticks": len(plan),
                    "idle": f"{idle:.1%}",
                    "keys": f"{2 * keys / 1e9:.2f}",
                    "gradients": f"{4 * keys / 1e9:.2f}",
                    "inputs": f"{2 * states / 1e9:.2f}",
                    "inputs of layers": f"{2 * states * config.num_layers / devices / 1e9:.2f}",
                }
            )
    return found


if __name__ == "__main__":
    report("backprop/chunk_pipeline", rows())
