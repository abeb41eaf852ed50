"""The gradient of a step whose sequences are read by groups of devices of different sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from streamjax.models.decoder import Decoder
from streamjax.parallel.mesh import make_mesh
from streamjax.training.backprop.loss_and_grad import loss_and_grad
from streamjax.training.sequence_groups.planning import Plan

_LEAST = 16  # tokens of a device, below which lengths are not told apart


def grouped_loss_and_grad(
    model: Decoder,
    sequences: Sequence[Mapping[str, np.ndarray]],
    plan: Plan,
    *,
    devices: Sequence[jax.Device] | None = None,
    **options: Any,
) -> tuple[Float[Array, ""], Decoder]:
    """Loss of sequences of mixed lengths, and its gradient: that of all of them in one batch, but for rounding.

    A group packs its sequences into one row, which its devices share along the mesh axis `context`. All groups of a
    round are at work at the same time. Rows are filled up to one of few lengths, so that few programs are compiled.

    Args:
      model: whole on each device.
      sequences: tokens and targets int32 [T], weights float [T] of each.
      plan: of `plan_groups`, for the lengths of these sequences.
      devices: all of this process's where None.
      options: of `loss_and_grad`: `method`, `context_exchange` and so on.

    Returns:
      The weighted mean loss over the tokens of all sequences, and the gradient, where the model lies.

    Raises:
      ValueError: a plan of other sequences, or of more devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    numbers = sorted(number for groups in plan.rounds for group in groups for number in group.sequences)
    if numbers != list(range(len(sequences))):
        raise ValueError(f"the plan is for {len(numbers)} sequences, and {len(sequences)} are given: make a new plan")
    needed = max(group.first + group.degree for groups in plan.rounds for group in groups)
    if needed > len(devices):
        raise ValueError(f"the plan is for {needed} devices, and there are {len(devices)}: make a new plan")
    total = sum(float(np.sum(sequence["weights"], dtype=np.float64)) for sequence in sequences)
    places = jax.tree.map(lambda x: x.sharding, model)
    loss, grads = None, None
    for groups in plan.rounds:
        found = []
        for group in groups:
            mesh = make_mesh(context=group.degree, devices=devices[group.first : group.first + group.degree])
            batch, count = _packed([sequences[number] for number in group.sequences], group.degree)
            whole = NamedSharding(mesh, PartitionSpec())
            with jax.set_mesh(mesh):
                own = loss_and_grad(jax.device_put(model, whole), jax.device_put(batch, whole), **options)
                found.append(_scaled(own, jnp.asarray(count / total)))
        for own_loss, own_grads in found:  # only now: a sum waits for what it adds
            own_grads = jax.device_put(own_grads, places)
            own_loss = jax.device_put(own_loss, jax.tree.leaves(places)[0])
            loss, grads = (own_loss, own_grads) if grads is None else _added((loss, grads), (own_loss, own_grads))
    assert loss is not None
    assert grads is not None
    return loss, grads


@jax.jit
def _scaled(tree: Any, share: Float[Array, ""]) -> Any:
    return jax.tree.map(lambda x: x * jnp.asarray(share, x.dtype), tree)


@jax.jit
def _added(first: Any, second: Any) -> Any:
    return jax.tree.map(jnp.add, first, second)


def _packed(sequences: Sequence[Mapping[str, np.ndarray]], degree: int) -> tuple[dict[str, np.ndarray], float]:
    """One row of all sequences, filled up with weight 0, and the sum of the weights."""
    lengths = [sequence["tokens"].shape[0] for sequence in sequences]
    length = _row_length(sum(lengths), degree)
    row = {name: np.zeros((1, length), sequences[0][name].dtype) for name in ("tokens", "targets", "weights")}
    row |= {name: np.zeros((1, length), np.int32) for name in ("segment_ids", "positions")}
    first = 0
    for number, (sequence, size) in enumerate(zip(sequences, lengths, strict=True)):
        there = (0, slice(first, first + size))
        for name in ("tokens", "targets", "weights"):
            row[name][there] = sequence[name]
        row["segment_ids"][there], row["positions"][there] = number + 1, np.arange(size)
        first += size
    return row, float(np.sum(row["weights"], dtype=np.float64))


def _row_length(tokens: int, degree: int) -> int:
    """The next of 16, 20, 24, 28, 32, 40, ... tokens a device: a fourth more at most."""
    each = max(_LEAST, -(-tokens // degree))
    step = max(1, 1 << (each.bit_length() - 3)) if each & (each - 1) else 1
    return -(-each // step) * step * degree
