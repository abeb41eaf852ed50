"""The state of a checkpoint, where the run goes on with other replicas, or skips steps and did not before."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from streamjax.checkpoints import RunCheckpoints
from streamjax.training.diloco.replicas import resized, shapes_with
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.state import TrainState, no_skips


def restored(
    checkpoints: RunCheckpoints, step: int, state: TrainState, config: TrainConfig, mesh: Mesh | None
) -> tuple[TrainState, dict[str, Any]]:
    """The state of a checkpoint, in the structure and on the devices of `state`, and what was saved beside it.

    Raises:
      ValueError: as `RunCheckpoints.restore`; a run of replicas goes on without any, or the other way round.
    """
    there = checkpoints.about(step)
    before, now = there.get("replicas", 0), config.diloco.replicas
    if there and bool(before) != bool(now):
        raise ValueError(
            f"the checkpoint of step {step} is of a run with config.diloco.replicas={before}, not {now}: a run may go "
            "on with more or fewer replicas, but not with and without; choose another --workdir"
        )
    template = shapes_with(state, before, mesh) if before != now else state
    changed = bool(there) and _had_skips(there) != (state.skips is not None)
    if changed:
        template = dataclasses.replace(template, skips=_counters(template, before) if _had_skips(there) else None)
    found, about = checkpoints.restore(step, template)
    found = resized(found, now, mesh) if before != now else found
    return dataclasses.replace(found, skips=state.skips) if changed else found, about


def _had_skips(about: dict[str, Any]) -> bool:
    """Whether steps could be skipped in the run that saved a checkpoint."""
    return any(name.startswith("skips.") for name in about["arrays"])


def _counters(template: TrainState, replicas: int) -> Any:
    """Shapes of what is known of skipped steps, of each replica where there are any."""
    shape, place = (replicas,) if replicas else (), template.step.sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=place), no_skips())
