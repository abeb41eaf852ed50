"""What a training run carries from step to step, and how batches reach the devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int32

from streamjax.models.decoder import Decoder
from streamjax.parallel.rules import partition_spec
from streamjax.streaming.state import StreamState
from streamjax.training.backprop.trainable_parameters import Trainable, partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Model with its master weights, optimizer state, and the number of steps done (int32 scalar).

    stream: what is cached of the streams that the model trains on, one a row of a batch; None in ordinary training.
    outer: with Streaming DiLoCo what its replicas have agreed on of each fragment (`training.diloco.replicas`); model
      and optimizer state are then those of all replicas, [R, ...].
    """

    model: Decoder
    opt_state: Any
    step: Int32[Array, ""]
    stream: StreamState | None = None
    outer: Any = None


def new_state(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    stream: StreamState | None = None,
    trainable: Trainable = nnx.Param,
) -> TrainState:
    """The state before the first step; the optimizer has a state for parameters of the type `trainable` alone.

    Pure: under `streamjax.parallel.mesh.build_sharded` the optimizer's arrays are made in their places.
    """
    params, _ = partition(model, trainable)
    return TrainState(model, optimizer.init(params), jnp.zeros((), jnp.int32), stream)


def shard_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Host arrays [B, T] or [B] to device arrays, rows split over the mesh's batch axes.

    With several processes each passes its own rows.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)

    def place(x: Any) -> Array:
        shape = (x.shape[0] * jax.process_count(), *x.shape[1:])
        sharding = NamedSharding(mesh, partition_spec(("batch", *(None,) * (x.ndim - 1)), shape, mesh))
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(place, batch)
