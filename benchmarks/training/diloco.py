"""Streaming DiLoCo against data parallelism at equal tokens: held-out loss, and the bytes that replicas exchange.

The model of `configs/tiny.py` reads the built-in corpus, 24 rows of 128 bytes a step. Data parallelism averages
gradients at every step; a ring sends `2 (R - 1) / R` of them, in float32. Replicas of Streaming DiLoCo send what they
have moved by, to each other one, every 30 steps, in 4 bits. `lost` loses one of four replicas after a third of the
steps, whose rows the others take over, and has four again after two thirds. `MB sent` is what one replica sends.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.reporting import report
from streamjax.data import load_tokenizer, make_eval_batches, make_train_iterator
from streamjax.models import Decoder
from streamjax.training import (
    DiLoCoConfig,
    OptimizerConfig,
    TrainConfig,
    evaluate,
    make_optimizer,
    make_train_step,
    new_state,
)
from streamjax.training.diloco.replicas import one_model, replicate, resized
from streamjax.training.diloco.steps import Replicas
from streamjax.training.run.step import step_function

ROOT = Path(__file__).parents[2]
ROWS = 24


def config_of(steps: int) -> TrainConfig:
    config = runpy.run_path(str(ROOT / "configs/tiny.py"))["get_config"]()
    data = dataclasses.replace(config.data, batch_size=ROWS)
    return dataclasses.replace(config, data=data, steps=steps, optimizer=OptimizerConfig(4e-3, warmup_steps=30))


def run(config: TrainConfig, schedule: dict[int, DiLoCoConfig] | None) -> dict[str, Any]:
    """Train; `schedule` has the replicas from each step on, None for data parallelism."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    optimizer = make_optimizer(config.optimizer, config.steps)
    assert config.model is not None
    model = jax.jit(lambda: Decoder(config.model, jax.random.key(0), param_dtype=jnp.float32))()
    state = new_state(model, optimizer)
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    step, sent, curve = make_train_step(optimizer), 0.0, {}
    batches = make_train_iterator(config.data)
    held_out = list(make_eval_batches(config.data, 8))
    replicas, trains, now = None, step, None
    for number in range(config.steps):
        if schedule and number in schedule:
            now = schedule[number]
            state = replicate(state, now, nnx.Param, None) if number == 0 else resized(state, now.replicas, None)
            replicas = Replicas(now, step_function(optimizer), state, nnx.Param, None)
        batch = jax.tree.map(jnp.asarray, next(batches))
        if replicas is None or now is None:
            state, _ = trains(state, batch)
        else:
            state, _ = replicas(state, batch, number)
            sent += (replicas.sent_bytes(number + 1) - replicas.sent_bytes(number)) * (now.replicas - 1)
        if (number + 1) % (config.steps // 3) == 0:
            found = evaluate(one_model(state), held_out, tokenizer)
            curve[f"bits a byte at {number + 1}"] = round(found["eval_bits_per_byte"], 3)
    return {"parameters": count, "sent": sent, **curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=450)
    steps = parser.parse_args().steps
    config, rows = config_of(steps), []
    parallel = run(config, None)
    curve = {name: value for name, value in parallel.items() if name.startswith("bits")}
    for count in (2, 4):
        ring = 2 * (count - 1) / count * 4 * parallel["parameters"] * steps
        one = DiLoCoConfig(replicas=count)
        plans = {f"Streaming DiLoCo, {count}": {0: one}}
        if count == 4:
            fewer = dataclasses.replace(one, replicas=3)
            plans["Streaming DiLoCo, 4, lost"] = {0: one, steps // 3: fewer, 2 * (steps // 3): one}
        rows.append({"": f"data parallel, {count}", **curve, "MB sent": round(ring / 1e6, 2), "ratio": 1})
        for name, plan in plans.items():
            found = run(config, plan)
            sent = found.pop("sent")
            found.pop("parameters")
            rows.append({"": name, **found, "MB sent": round(sent / 1e6, 2), "ratio": math.floor(ring / sent)})
    report("training/diloco", rows)


if __name__ == "__main__":
    main()
