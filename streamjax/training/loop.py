"""The training loop: steps, evaluation, metrics, checkpoints, and resuming exactly where a run stopped.

Everything that a step depends on is in the checkpoint: weights, optimizer state, step, and the place in the input. A run
that was killed at any point and started again ends with the same bits as one that never was.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from streamjax.checkpoints import RunCheckpoints
from streamjax.data import load_tokenizer, make_eval_batches, make_train_iterator
from streamjax.models.decoder import Decoder
from streamjax.training.config import MeshConfig, TrainConfig
from streamjax.training.metrics import MetricsWriter
from streamjax.training.optimizer import learning_rate_schedule, make_optimizer
from streamjax.training.signals import StopSignals
from streamjax.training.state import TrainState, build_sharded, new_state, shard_batch
from streamjax.training.step import eval_step, make_train_step

# What may change between two starts of one run without changing what is computed.
_FREE_FIELDS = ("log_interval", "eval_interval", "eval_batches", "checkpoint_interval", "keep_checkpoints", "mesh")


class RunStopped(Exception):
    """A run ended before its last step; the message is one line, `exit_code` the process's."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh | None:
    """The mesh that `config` describes; None for one device."""
    shape = (config.data, config.fsdp, config.tensor)
    size = math.prod(shape)
    if size == 1 and jax.device_count() == 1:
        return None
    if size != jax.device_count() and size != 1:
        raise ValueError(f"mesh of data x fsdp x tensor = {size} devices; this machine has {jax.device_count()}")
    if size == 1:
        return None
    axis_types = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=axis_types)


def evaluate(model: Decoder, batches: Iterable[Any], mesh: jax.sharding.Mesh | None, bytewise: bool) -> dict[str, float]:
    """Loss in nats per token, perplexity, and for byte tokenizers bits per byte, over `batches`."""
    sums = [eval_step(model, shard_batch(batch, mesh)) for batch in batches]
    total, weight = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
    loss = float(total / max(weight, 1e-9))
    values = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
    return values | ({"eval_bits_per_byte": loss / math.log(2.0)} if bytewise else {})


def train(config: TrainConfig, workdir: str | Path, *, progress: bool | None = None) -> TrainState:
    """Run `config` in `workdir`, from the newest checkpoint there if there is one, and export the model.

    Args:
      config: the run.
      workdir: where checkpoints, metrics, the configuration and at the end `model/` go.
      progress: whether to show a progress bar; by default where stderr is a terminal.

    Returns:
      The final state.

    Raises:
      ValueError: a workdir of another configuration, or a configuration that does not fit the data or the machine.
      RunStopped: SIGTERM or Ctrl-C (a checkpoint has been saved), or a loss that is not finite.
    """
    workdir = Path(workdir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    mesh = make_mesh(config.mesh)
    _claim(workdir, config)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    train_step = make_train_step(optimizer, method=config.method, accumulation=config.optimizer.accumulation)
    shard = grain.sharding.ShardByJaxProcess() if jax.process_count() > 1 else None
    data = make_train_iterator(config.data, shard=shard)
    eval_batches = make_eval_batches(config.data, config.eval_batches, shard=shard)

    def build(key: jax.Array) -> TrainState:
        model = Decoder(
            config.model, key, dtype=jnp.dtype(config.dtype), param_dtype=jnp.float32, scan_layers=config.scan_layers
        )
        return new_state(model, optimizer)

    state = build_sharded(build, mesh, jax.random.key(config.seed))
    checkpoints = RunCheckpoints(workdir / "checkpoints", config.keep_checkpoints)
    step = checkpoints.latest_step or 0
    if step:
        state, about = checkpoints.restore(step, state)
        data.set_state(about["data"])
    metrics = MetricsWriter(workdir, step)
    tokens_per_step = config.data.batch_size * config.data.seq_len
    pending: list[dict[str, jax.Array]] = []
    started = time.monotonic()
    bar = tqdm.tqdm(total=config.steps, initial=step, unit="step", disable=None if progress is None else not progress)

    def report() -> None:
        """Read the metrics of the steps since the last report; no step with a bad one may reach a checkpoint."""
        nonlocal started
        if not pending:
            return
        values = jax.device_get(pending)
        pending.clear()
        for i, found in enumerate(values):
            if not (np.isfinite(found["loss"]) and np.isfinite(found["grad_norm"])):
                bad, last = step - len(values) + i + 1, checkpoints.latest_step or 0
                raise RunStopped(f"loss or gradient is not finite at step {bad}; step {last} is saved and good", 1)
        now = time.monotonic()
        speed = len(values) * tokens_per_step / (now - started)
        started = now
        loss = float(np.mean([found["loss"] for found in values]))
        norm = float(values[-1]["grad_norm"])
        rate = float(schedule(step - 1))
        metrics.write(
            step, {"loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens_per_second": round(speed, 1)}
        )
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")

    def save() -> None:
        checkpoints.save(step, state, {"step": step, "data": data.get_state(), "tokenizer": tokenizer.name})

    mesh_context = jax.set_mesh(mesh) if mesh is not None else None
    try:
        with StopSignals() as stop:
            if mesh_context is not None:
                mesh_context.__enter__()
            while step < config.steps:
                state, found = train_step(state, shard_batch(next(data), mesh))
                pending.append(found)
                step += 1
                bar.update()
                last = step == config.steps
                if step % config.log_interval == 0 or last:
                    report()
                if step % config.eval_interval == 0 or last:
                    report()
                    values = evaluate(state.model, eval_batches, mesh, tokenizer.name == "bytes")
                    metrics.write(step, values)
                    bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
                    started = time.monotonic()
                if step % config.checkpoint_interval == 0 or last or stop.received:
                    report()
                    save()
                if stop.received and not last:
                    code = 128 + int(stop.received)
                    name = "Ctrl-C" if stop.received == signal.SIGINT else stop.received.name
                    raise RunStopped(f"{name}: saved step {step}; the same command continues from there", code)
    finally:
        if mesh_context is not None:
            mesh_context.__exit__(None, None, None)
        bar.close()
        metrics.close()
        checkpoints.close()
    _export(state.model, workdir / "model")
    return state


def _export(model: Decoder, folder: Path) -> None:
    from streamjax.models.hf import save_hf

    save_hf(model, folder)


def _claim(workdir: Path, config: TrainConfig) -> None:
    """Write the configuration into the workdir, or check that it is the one that is there."""
    path = workdir / "config.json"
    values = config.to_json_dict()
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name in _changes(before, values) if name.split(".")[0] not in _FREE_FIELDS]
        if changed:
            raise ValueError(f"{workdir} holds a run with another {changed[0]}: choose another --workdir, or change it back")
    workdir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)


def _changes(before: Any, after: Any, name: str = "") -> list[str]:
    """Names of the fields in which two nested dictionaries differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = list(dict.fromkeys([*before, *after]))
        return [c for n in names for c in _changes(before.get(n), after.get(n), f"{name}.{n}" if name else n)]
    return [] if before == after else [name]
