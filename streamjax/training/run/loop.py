"""The training loop: steps, evaluation, metrics, checkpoints, and resuming exactly where a run stopped.

Everything that a step depends on is in a checkpoint: weights, optimizer state, the step, and the place in the input. A
run that was killed at any point and started again ends with the same bits as one that never was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from streamjax.checkpoints import RunCheckpoints
from streamjax.data import load_tokenizer
from streamjax.parallel.mesh import make_mesh, row_share
from streamjax.parallel.multiprocess import gather_json, max_over_processes
from streamjax.parallel.rules import STAGE
from streamjax.training.backprop.loss_and_grad import choice_for, offload_fraction_for
from streamjax.training.backprop.planning.host_transfers import measure_rates
from streamjax.training.backprop.planning.method_choice import available_host_bytes, device_memory_bytes
from streamjax.training.backprop.trainable_parameters import partition
from streamjax.training.diloco.replicas import count_replicas, one_model, replicate
from streamjax.training.diloco.steps import Replicas
from streamjax.training.elimination.kept_tokens import TokenElimination
from streamjax.training.elimination.warm_up import trained_or_read
from streamjax.training.run.config import MeshConfig, TrainConfig
from streamjax.training.run.feeds import make_feed
from streamjax.training.run.goodput import Goodput
from streamjax.training.run.initial_state import initial_state, mesh_sizes
from streamjax.training.run.metrics import MetricsWriter, metrics_from_json, metrics_to_json
from streamjax.training.run.optimizer import learning_rate_schedule, make_optimizer
from streamjax.training.run.restoring import open_copies, restored
from streamjax.training.run.signals import StopSignals
from streamjax.training.run.state import TrainState
from streamjax.training.run.step import make_train_step, step_function
from streamjax.training.run.workdir import claim, export, one_run_in, open_snapshots

_log = logging.getLogger(__name__)
PREDICTORS_FILE = "predictors.safetensors"  # in the workdir
_HOST_SHARE = 0.8  # of the host's free memory that layers' inputs may fill


class RunStopped(Exception):
    """A run ended before its last step; the message is one line, `exit_code` the process's."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def train(
    config: TrainConfig, workdir: str | Path, *, progress: bool | None = None, resume_from: int | None = None
) -> TrainState:
    """Run `config` in `workdir`, from the newest checkpoint there if there is one, and export the model.

    Args:
      config: the run.
      workdir: where the configuration, checkpoints, metrics and at the end `model/` go. With several processes, a
        folder that all of them see.
      progress: whether to show a progress bar; where None, if stderr is a terminal.
      resume_from: the step of an earlier checkpoint to go on from, 0 to begin again; later checkpoints are moved to
        `checkpoints_set_aside`. The newest one where None.

    Returns:
      The final state.

    Raises:
      ValueError: a workdir of another configuration or in use by another run, processes without a mesh, or a
        configuration that does not fit the data or the machine; a damaged checkpoint, with the step before it that is
        whole.
      RunStopped: SIGTERM, SIGHUP or Ctrl-C (a checkpoint has been saved), or a loss or weights that are not finite.
    """
    _check_processes(config)
    with one_run_in(Path(workdir)):
        return _train(_Run(config, Path(workdir), progress, resume_from))


def _check_processes(config: TrainConfig) -> None:
    count = jax.process_count()
    if count > 1 and config.mesh == MeshConfig():
        raise ValueError(
            f"{count} processes without a mesh would train {count} models apart: set config.mesh, for instance "
            f"--config.mesh.data={len(jax.devices())} for all devices"
        )


def _train(run: _Run) -> TrainState:
    config = run.config
    try:
        with StopSignals() as stop, run.on_mesh():
            while run.step < config.steps:
                run.advance()
                last = run.step == config.steps
                # One process looks after every step; several must agree, which costs a round of messages.
                together = jax.process_count() == 1 or run.step % config.log_interval == 0
                stop_signal = max_over_processes(stop.received or 0) if together else 0
                if run.step % config.log_interval == 0 or last:
                    run.report()
                if run.step % config.eval_interval == 0 or last:
                    run.evaluate()
                if run.step % config.checkpoint_interval == 0 or last or stop_signal:
                    run.save()
                if config.snapshots.interval and run.step % config.snapshots.interval == 0 and not last:
                    run.take_snapshot()
                if stop_signal and not last:
                    name = "Ctrl-C" if stop_signal == signal.SIGINT else signal.Signals(stop_signal).name
                    message = f"{name}: saved step {run.step} of {config.steps}; the same command continues from there"
                    raise RunStopped(message, 128 + stop_signal)
            export(one_model(run.state), run.workdir, config)
        run.ended = True
    except RunStopped:
        run.ended = True
        raise
    finally:
        run.close()
    return run.state


class _Run:
    """What the loop holds, and the things that it does at intervals."""

    def __init__(self, config: TrainConfig, workdir: Path, progress: bool | None, resume_from: int | None = None):
        self.config, self.workdir, self.clock = config, workdir, Goodput()
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        sizes, self.mesh_line = mesh_sizes(config)
        self.mesh = None if sizes == MeshConfig() else make_mesh(**dataclasses.asdict(sizes))
        self.rows = row_share(self.mesh)
        config.check_context(1 if self.mesh is None else self.mesh.shape["context"])  # -1 is a number now
        self.schedule = learning_rate_schedule(config.optimizer, config.steps)
        self.state = initial_state(config, self.tokenizer, self.mesh)
        config.check_context(1 if self.mesh is None else self.mesh.shape["context"], self.state.model.config)
        with self.on_mesh():
            self.feed = make_feed(config, self.tokenizer, self.state.model, self.mesh, workdir)
        if config.diloco.replicas:
            self.state = replicate(self.state, config.diloco, config.trainable, self.mesh)
        claim(workdir, config)
        self.elimination_line = ""
        elimination = self._token_elimination() if config.lemo.share < 1.0 else None
        self.copies = open_copies(config, workdir, resume_from)
        self.checkpoints = RunCheckpoints(workdir / "checkpoints", config.keep_checkpoints)
        self.snapshots, self.ended = open_snapshots(config.snapshots, workdir), False
        self.pending: list[dict[str, Any]] = []
        self.measured: tuple[str, ...] = ()  # what the feed measured, besides the step
        self.step = (self.checkpoints.latest_step or 0) if resume_from is None else resume_from
        in_memory = resume_from is None and self._restore_snapshot()
        if self.step and not in_memory:
            self.state, about = restored(self.checkpoints, self.step, self.state, config, self.mesh)
            self.clock.set_state(about.get("goodput", self.clock.get_state()))
            self._find_place(about["data"], about.get("rows"))
        if resume_from is not None:
            self.checkpoints.set_aside_after(self.step)
            if self.copies is not None:
                self.copies.set_aside_after(self.step)
        self.metrics = MetricsWriter(workdir, self.step) if jax.process_index() == 0 else None
        quiet = jax.process_index() > 0 or (None if progress is None else not progress)
        self.bar = tqdm.tqdm(total=config.steps, initial=self.step, unit="step", disable=quiet, dynamic_ncols=True)
        self.since = time.monotonic()
        if self.step:
            source = ", from memory" if in_memory else ""
            self._say(f"resumed at step {self.step} of {config.steps}{source}")
        if self.mesh_line:
            self._say(self.mesh_line)
        if self.elimination_line:
            self._say(self.elimination_line)
        optimizer, trainable = make_optimizer(config.optimizer, config.steps), config.trainable
        options = {
            "accumulation": config.optimizer.accumulation,
            "trainable": trainable,
            "objective": config.objective,
            "spike_factor": config.optimizer.spike_factor,
            "aligned": config.distill.layers,
            "pipeline": config.pipeline,
            **self._backprop_options(),
        }
        self.replicas: Replicas | None = None
        if config.diloco.replicas:
            step = step_function(optimizer, **options)
            self.replicas = Replicas(config.diloco, step, self.state, trainable, self.mesh)
        else:
            self.train_step = make_train_step(optimizer, elimination=elimination, **options)

    def on_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _restore_snapshot(self) -> bool:
        """Go on from a snapshot in memory, if there is one that is not behind the newest checkpoint; whether."""
        snapshots, found = self.snapshots, None
        if snapshots is None:
            return False
        if (snapshots.newest_step or 0) >= max(self.step, 1):
            found = snapshots.restore(self.state)
        if found is not None and not all(gather_json(found[1].get("rows") == list(self.rows))):
            found = None  # another mesh, whose processes read other rows
        if found is not None:
            self.step, (self.state, about) = snapshots.newest_step or 0, found
            self.clock.set_state(about["goodput"])
            self.feed.set_state(about["data"])
            self.pending, self.measured = metrics_from_json(about["metrics"]), tuple(about["measured"])
        snapshots.begin(keep=found is not None)
        if snapshots.lost:  # what would be lost with the next machine is coded anew
            self.take_snapshot()
        return found is not None

    def _find_place(self, places: list[Any], rows: list[list[int]] | None) -> None:
        """Go to the place in the input that a checkpoint has of each of its processes, or of as many others.

        `rows` says which share of a batch's rows each of them read; where None, each read its own.
        """
        rows = rows or [[number, len(places)] for number in range(len(places))]
        if list(self.rows) in rows:
            self.feed.set_state(places[rows.index(list(self.rows))])
            return
        if jax.process_index() == 0:
            here = (
                f"{rows[0][1]} shares of the rows were read up to step {self.step}, and there are {self.rows.parts} now"
            )
            _log.info("%s: reading the input up to there, as it is dealt out now", here)
        self.feed.skip(self.step)

    def _backprop_options(self) -> dict[str, Any]:
        """How gradients are made: for "auto" what the memory beside the optimizer's state allows, told in a line."""
        config = self.config
        options = config.backprop.options()
        if options["offload_fraction"] == "auto":
            options["offload_fraction"] = self._offload_fraction()
        if config.backprop.method != "auto":
            return options
        if self.mesh is not None and self.mesh.shape.get(STAGE, 1) > 1:
            return {**options, "method": "remat"}
        accumulation = config.optimizer.accumulation
        trained, _ = partition(self.state.model, config.trainable)
        held = [self.state.opt_state] + [trained] * (accumulation > 1)  # gradients of earlier microbatches
        shards = [leaf.addressable_shards[0] for leaf in jax.tree.leaves(held)]
        memory = min(gather_json(device_memory_bytes() - sum(shard.data.nbytes for shard in shards)))
        with self.on_mesh():
            found = choice_for(
                self.state.model,
                config.data.batch_size // accumulation // self._in_turn(),
                config.data.seq_len,
                memory_bytes=memory,
                chunk_size=config.backprop.chunk_size,
                trainable=config.trainable,
            )
        self._say(f"backprop: {found.describe(memory)}")
        return {**options, **found.arguments}

    def _offload_fraction(self) -> float:
        """How much of layers' inputs goes to the host's memory without costing time, in all processes alike."""
        config = self.config
        rates = measure_rates(self.state.model.dtype)
        host_bytes = _HOST_SHARE * available_host_bytes() / jax.local_device_count()
        with self.on_mesh():
            own = offload_fraction_for(
                self.state.model,
                config.data.batch_size // config.optimizer.accumulation // self._in_turn(),
                config.data.seq_len,
                rates=rates,
                host_bytes=host_bytes,
                chunk_size=config.backprop.chunk_size,
                keep_attention=config.backprop.keep_attention,
            )
        found = min(gather_json(own))
        links = f"{rates.to_host / 1e9:.3g} and {rates.from_host / 1e9:.3g} GB/s to the host and back"
        self._say(f"backprop: offload_fraction {found:g} ({links}, {rates.flops / 1e12:.3g} TFLOP/s)")
        return found

    def _token_elimination(self) -> TokenElimination:
        """What layers compute, by predictors from a file or trained here, on the rows that the run begins with."""
        config = self.config
        with self.on_mesh():
            feed, model = make_feed(config, self.tokenizer, self.state.model, self.mesh, self.workdir), self.state.model
            batches = (feed.next(model, step)[0] for step in range(config.lemo.steps))
            found = trained_or_read(model, batches, config.lemo, self.workdir / PREDICTORS_FILE, config.seed)
        shares = found.shares(config.lemo.share, config.lemo.equal)
        self.elimination_line = f"lemo: layers compute {min(shares):.2f} to {max(shares):.2f} of their tokens"
        return found.elimination(model, config.lemo.share, config.lemo.equal)

    def _in_turn(self) -> int:
        """How many replicas the same devices train, one after the other."""
        along = 1 if self.mesh is None else self.mesh.shape.get("replica", 1)
        return max(1, self.config.diloco.replicas // along)

    def advance(self) -> None:
        """One step; what it measured stays on the device until the next report."""
        try:
            with self.clock.spending("data"):
                batch, measured = self.feed.next(self.state.model, self.step)
        except StopIteration:
            raise ValueError(
                f"the data ends after {self.step} steps: set config.data.epochs=none, or config.steps={self.step}"
            ) from None
        if self.replicas is None:
            self.state, found = self.train_step(self.state, batch)
        else:
            self.state, found = self.replicas(self.state, batch, self.step)
        self.clock.switch("steps")  # the first one has compiled the program
        self.pending.append({**found, **measured})
        self.measured = tuple(measured)
        self.step += 1
        self.bar.update()

    def report(self) -> None:
        """Read and write the metrics of the steps since the last report.

        Raises:
          RunStopped: one of them is not finite.
        """
        if not self.pending:
            return
        values = self._finite_metrics()
        self.pending.clear()
        now = time.monotonic()
        speed = len(values) * self.config.data.batch_size * self.config.data.seq_len / (now - self.since)
        self.since = now
        taken = [found["loss"] for found in values if not found.get("skipped_in_a_row", 0)]
        loss = float(np.mean(taken)) if taken else float("nan")
        measured = {name: float(np.mean([found[name] for found in values])) for name in self.measured}
        self._write(
            {
                "loss": loss,
                "grad_norm": float(values[-1]["grad_norm"]),
                "param_norm": float(values[-1]["param_norm"]),
                **{name: float(x) for name, x in values[-1].items() if name.startswith(("expert_", "router_"))},
                **measured,
                **{name: int(values[-1][name]) for name in ("skipped_steps",) if name in values[-1]},
                **({} if self.replicas is None else {"sent_bytes": self.replicas.sent_bytes(self.step)}),
                "learning_rate": float(self.schedule(self.step - 1)),
                "tokens_per_second": round(speed, 1),
                **self.clock.metrics(),
            }
        )
        reward = f"reward {measured['reward']:.3f}, " if "reward" in measured else ""
        summary = f"{reward}loss {loss:.3f}, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(summary)
        if self.bar.disable:
            self._say(f"step {self.step} of {self.config.steps}: {summary}")

    def _finite_metrics(self) -> list[dict[str, Any]]:
        """The metrics of the steps since the last report.

        Raises:
          RunStopped: one of them is not finite.
        """
        values: list[dict[str, Any]] = jax.device_get(self.pending)
        limit = self.config.optimizer.skip_nonfinite
        for step, found in enumerate(values, self.step - len(values) + 1):
            if (skipped := int(found.get("skipped_in_a_row", 0))) > limit:
                raise RunStopped(
                    f"{skipped} steps in a row, up to step {step}, had a loss or gradient that is not finite or spikes "
                    f"(optimizer.skip_nonfinite={limit}); {self._kept(step - skipped + 1)}",
                    1,
                )
            if skipped:
                continue
            if not (np.isfinite(found["loss"]) and np.isfinite(found["grad_norm"])):
                raise RunStopped(f"the loss or its gradient is not finite at step {step}; {self._kept(step)}", 1)
            if not np.isfinite(found["param_norm"]):
                message = f"the weights are not finite after step {step}, nor is their norm; {self._kept(step + 1)}"
                raise RunStopped(message, 1)
        return values

    def _kept(self, step: int) -> str:
        """What is left where the weights before `step` led to nothing finite: checkpoints that went on well."""
        steps = self.checkpoints.steps
        good = max((saved for saved in steps if saved < step - 1), default=None)
        if not steps:
            return "no checkpoint was saved before"
        if good is None:
            return f"the only checkpoint, of step {steps[-1]}, leads here again: begin anew, with other settings"
        hint = "" if good == steps[-1] else f", and that of step {steps[-1]} leads here again: --resume_from={good}"
        return f"the checkpoint of step {good} is good{hint}"

    def evaluate(self) -> None:
        """Measure the model on the validation split."""
        self.report()
        with self.clock.spending("evaluation"):
            values = self.feed.evaluate(one_model(self.state))
        self._write(values)
        self._say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self.since = time.monotonic()

    def save(self) -> None:
        """Save a checkpoint; never of a state that a step which was not finite has touched."""
        self.report()
        places = gather_json(self.feed.get_state())
        about: dict[str, Any] = {
            "tokenizer": self.tokenizer.name,
            "data": places,
            "rows": gather_json(self.rows),
            "goodput": self.clock.get_state(),
            "replicas": count_replicas(self.state),
        }
        with self.clock.spending("checkpoints"):
            self.checkpoints.save(self.step, self.state, about)
        if self.copies is not None:
            self.copies.send(self.workdir / "checkpoints", self.step)

    def take_snapshot(self) -> None:
        """Keep the state in the memory of this and of other machines; never one that a step has spoilt."""
        assert self.snapshots is not None
        about = {
            "data": self.feed.get_state(),
            "rows": list(self.rows),
            "goodput": self.clock.get_state(),
            "metrics": metrics_to_json(self._finite_metrics()),
            "measured": self.measured,
        }
        with self.clock.spending("checkpoints"):
            self.snapshots.take(self.step, self.state, about)

    def close(self) -> None:
        """Let go of files, after a save that is under way."""
        if self.snapshots is not None:
            self.snapshots.close(self.ended)
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()
        self.checkpoints.close()
        if self.copies is not None:
            self.copies.close()

    def _say(self, line: str) -> None:
        if not self.bar.disable:
            self.bar.write(line, file=sys.stderr)
        elif jax.process_index() == 0:
            _log.info(line)

    def _write(self, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write(self.step, values)
