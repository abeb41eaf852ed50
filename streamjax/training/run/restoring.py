"""The checkpoint that a run goes on from: fetched from its copies where the workdir lacks it, and its state.

The run may go on with other replicas, or skip steps and did not before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from streamjax.checkpoints import RunCheckpoints
from streamjax.checkpoints.copies import CheckpointCopies
from streamjax.checkpoints.pytrees import wait_for_others
from streamjax.training.diloco.replicas import resized, shapes_with
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.state import TrainState, no_skips
from streamjax.training.run.workdir import CONFIG_FILE, check_unchanged

_log = logging.getLogger(__name__)


def open_copies(config: TrainConfig, workdir: Path, resume_from: int | None = None) -> CheckpointCopies | None:
    """Those of the run, for the process that makes them; None for others, and where the configuration wants none.

    The checkpoint that the run goes on from is fetched, where it is not in the workdir: the newest one, or that of
    `resume_from`.

    Raises:
      ValueError: the address cannot be used, or it holds another run.
    """
    address = config.checkpoint_copies
    if address is None:
        return None
    copies = None
    if jax.process_index() == 0:
        copies = CheckpointCopies(address, config.keep_checkpoints)
        values = config.to_json_dict()
        if (before := copies.read(CONFIG_FILE)) is not None:
            check_unchanged(address, json.loads(before), values, "set checkpoint_copies to another address")
        copies.write(CONFIG_FILE, (json.dumps(values, indent=2) + "\n").encode())
        folder = workdir / "checkpoints"
        here = [int(place.name) for place in folder.glob("*") if place.name.isdigit()]
        there = copies.steps
        wanted = max([0, *here, *there]) if resume_from is None else resume_from
        if wanted and wanted not in here and wanted in there:
            _log.info("step %d comes from %s", wanted, address)
            copies.fetch(wanted, folder)
    wait_for_others("open_copies")
    return copies


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
