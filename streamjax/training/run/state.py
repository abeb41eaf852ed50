"""What a training run carries from step to step, and how batches reach the devices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from streamjax.models.decoder import Decoder
from streamjax.parallel.mesh import row_share
from streamjax.parallel.rules import RULES, partition_spec
from streamjax.streaming.state import StreamState
from streamjax.training.backprop.trainable_parameters import Trainable, partition

_DECAY = 0.95  # of the running mean of norms, which reaches back some twenty steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Skips:
    """What a run knows of steps that left the weights as they were: not finite, or with a gradient that spikes.

    total: steps that were skipped. in_a_row: those at the end, up to the last step. norm: the running mean of the norms
    of gradients that were taken; 0 before the first.
    """

    total: Int32[Array, "*R"]
    in_a_row: Int32[Array, "*R"]
    norm: Float[Array, "*R"]

    def judge(
        self, loss: Float[Array, ""], norm: Float[Array, ""], spike_factor: float | None
    ) -> tuple[Bool[Array, ""], Skips]:
        """Whether a step is to be taken, and what is known with it."""
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if spike_factor is not None:
            good &= (self.norm == 0) | (norm <= spike_factor * self.norm)
        mean = jnp.where(self.norm == 0, norm, _DECAY * self.norm + (1 - _DECAY) * norm)
        bad = jnp.where(good, 0, 1)
        mean = jnp.where(good, mean, self.norm).astype(self.norm.dtype)
        return good, Skips(self.total + bad, jnp.where(good, 0, self.in_a_row + 1), mean)


def no_skips() -> Skips:
    """Before the first step."""
    return Skips(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Model with its master weights, optimizer state, and the number of steps done (int32 scalar).

    stream: what is cached of the streams that the model trains on, one a row of a batch; None in ordinary training.
    outer: with Streaming DiLoCo what its replicas have agreed on of each fragment (`training.diloco.replicas`); model
      and optimizer state are then those of all replicas, [R, ...].
    skips: what is known of steps that were skipped; None where none may be.
    """

    model: Decoder
    opt_state: Any
    step: Int32[Array, ""]
    stream: StreamState | None = None
    outer: Any = None
    skips: Skips | None = None


def new_state(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    stream: StreamState | None = None,
    trainable: Trainable = nnx.Param,
    skipping: bool = False,
) -> TrainState:
    """The state before the first step; the optimizer has a state for parameters of the type `trainable` alone.

    skipping: steps whose loss or gradient is not finite are to be skipped.

    Pure: under `streamjax.parallel.mesh.build_sharded` the optimizer's arrays are made in their places.
    """
    params, _ = partition(model, trainable)
    return _placed_alike(
        TrainState(
            model, optimizer.init(params), jnp.zeros((), jnp.int32), stream, skips=no_skips() if skipping else None
        )
    )


def _placed_alike(state: TrainState) -> TrainState:
    """The state with new scalars committed to devices if the model's arrays are.

    A step's results are all committed as soon as one of its arguments is. If some of the first state's were not, `jit`
    would take the second step for another program and compile all of it again.
    """
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    known = [x.sharding for x in arrays if not isinstance(x, jax.core.Tracer) and x.committed]
    if not known:
        return state
    place = NamedSharding(known[0].mesh, PartitionSpec()) if isinstance(known[0], NamedSharding) else known[0]

    def commit(leaf: Any) -> Any:
        loose = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and not leaf.committed
        return jax.device_put(leaf, place) if loose else leaf

    return jax.tree.map(commit, state)


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Host arrays [B, T] or [B] to device arrays, rows split over the mesh's batch axes.

    With several processes each passes its own rows (`streamjax.parallel.mesh.row_share`), and those that have the same
    ones pass the same.

    Raises:
      ValueError: several processes, and rows that the mesh cannot divide among its devices.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    parts = row_share(mesh).parts
    over = math.prod(mesh.shape.get(name, 1) for name in RULES["batch"])

    def place(x: Any) -> Array:
        shape = (x.shape[0] * parts, *x.shape[1:])
        if jax.process_count() > 1 and shape[0] % over:
            raise ValueError(
                f"a batch of {shape[0]} rows cannot be divided among {over} groups of devices of several processes: "
                f"set data.batch_size to a multiple of {over}"
            )
        sharding = NamedSharding(mesh, partition_spec(("batch", *(None,) * (x.ndim - 1)), shape, mesh))
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(place, batch)
