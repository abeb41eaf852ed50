"""The programs of Streaming DiLoCo: a step of every replica, sending a fragment, and the outer step of one.

What is sent is gathered over replicas by the program of the next step, whose work does not wait for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from streamjax.training.backprop.loss_and_grad import Batch
from streamjax.training.backprop.trainable_parameters import Trainable
from streamjax.training.diloco.config import DiLoCoConfig
from streamjax.training.diloco.fragments import Fragment, change_parts, fragments_of, parts_of
from streamjax.training.diloco.messages import Message, decode, encode
from streamjax.training.diloco.replicas import Agreed, outer_optimizer, placement
from streamjax.training.run.state import TrainState

Sent = dict[str, Message]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


class Replicas:
    """Trains all replicas: a call is an inner step of each, and the exchange that falls due behind it.

        replicas = Replicas(config, step_function(optimizer), state, nnx.Param, mesh)
        state, metrics = replicas(state, batch, step)

    Args:
      config: when what is exchanged.
      step: of one replica.
      state: of all, by `replicas.replicate`; only its shapes count.
      trainable: the type of parameters that are trained.
      mesh: the devices; along `replica` it has replicas, each with the other axes. None: one device has all.
    """

    def __init__(self, config: DiLoCoConfig, step: Step, state: TrainState, trainable: Trainable, mesh: Mesh | None):
        self._config = config
        fragments = fragments_of(state.model, config.fragments, trainable)
        places = placement(state, mesh)
        stays = None if places is None else (dataclasses.replace(places, outer=None), None, None)
        self._inner = jax.jit(partial(_inner, step=step, mesh=mesh), donate_argnums=0, out_shardings=stays)
        self._send = [
            jax.jit(partial(_send, number=number, fragment=fragment, config=config, trainable=trainable),
                    donate_argnums=0, out_shardings=places)
            for number, fragment in enumerate(fragments)
        ]  # fmt: skip
        self._receive = [
            jax.jit(partial(_receive, number=number, fragment=fragment, config=config, trainable=trainable, mesh=mesh),
                    donate_argnums=0, out_shardings=places)
            for number, fragment in enumerate(fragments)
        ]  # fmt: skip
        self._bytes = [sum(x.nbytes for x in jax.tree.leaves(held.sent)) // config.replicas for held in state.outer]
        self._to_gather: int | None = None  # what was sent behind the last step
        self._gathered: dict[int, Sent] = {}

    def __call__(self, state: TrainState, batch: Batch, step: int) -> tuple[TrainState, dict[str, Array]]:
        """The state behind step `step` (from 0), which is donated, and the means of what replicas measured."""
        outer, number = state.outer, self._to_gather
        waiting = None if number is None else outer[number].sent
        state, metrics, gathered = self._inner(dataclasses.replace(state, outer=None), batch, waiting)
        state = dataclasses.replace(state, outer=outer)
        if number is not None:
            self._gathered[number] = gathered
        return self._exchange(state, step + 1), metrics

    def _exchange(self, state: TrainState, done: int) -> TrainState:
        number, self._to_gather = self._config.sent(done), None
        if number is not None:
            state = self._send[number](state)
            self._to_gather = number if self._config.overlap else None
        number = self._config.received(done)
        if number is not None:  # a run that was started anew has gathered nothing yet
            state = self._receive[number](state, self._gathered.pop(number, None))
        return state

    def sent_bytes(self, steps: int) -> int:
        """Bytes that one replica has sent to each other one in the first `steps` steps."""
        return sum(size * self._config.times_sent(number, steps) for number, size in enumerate(self._bytes))


def _inner(
    state: TrainState, batch: Batch, waiting: Sent | None, *, step: Step, mesh: Mesh | None
) -> tuple[TrainState, dict[str, Array], Sent | None]:
    """A step of each replica on its rows, by itself; and what waits to be gathered."""
    replicas = jax.tree.leaves(state.model)[0].shape[0]
    rows = jax.tree.map(lambda x: x.reshape(replicas, -1, *x.shape[1:]), batch)
    held = {"model": state.model, "opt_state": state.opt_state, "skips": state.skips}

    def one(own: tuple[dict[str, Any], Batch]) -> tuple[dict[str, Any], dict[str, Array]]:
        found, metrics = step(dataclasses.replace(state, **own[0]), own[1])
        return {name: getattr(found, name) for name in own[0]}, metrics

    def some(own: tuple[dict[str, Any], Batch]) -> tuple[dict[str, Any], dict[str, Array]]:
        if jax.tree.leaves(own)[0].shape[0] > 1:
            return jax.lax.map(one, own)
        return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], own)))

    if mesh is not None and mesh.shape.get("replica", 1) > 1:
        along = PartitionSpec("replica")
        some = jax.shard_map(
            some, mesh=jax.sharding.get_abstract_mesh(), axis_names={"replica"}, in_specs=(along,), out_specs=along,
            check_vma=False,
        )  # fmt: skip
    held, metrics = some((held, rows))
    means = {name: jnp.mean(x, axis=0) for name, x in metrics.items()}
    if "skipped_steps" in metrics:
        means |= {
            "skipped_steps": jnp.sum(metrics["skipped_steps"]),
            "skipped_in_a_row": jnp.max(metrics["skipped_in_a_row"]),
        }
    state = dataclasses.replace(state, step=state.step + 1, **held)
    return state, means, None if waiting is None else _gather(waiting, mesh)


def _gather(sent: Sent, mesh: Mesh | None) -> Sent:
    """The messages of all replicas on each, as they were sent: what crosses the axis are their few bits."""
    if mesh is None or mesh.shape.get("replica", 1) == 1:
        return sent
    free = PartitionSpec.UNCONSTRAINED

    def whole(x: Array) -> Array:
        spec = PartitionSpec(None, *(free,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(whole, sent)


def _send(
    state: TrainState, *, number: int, fragment: Fragment, config: DiLoCoConfig, trainable: Trainable
) -> TrainState:
    """The state with a message of each replica: from where to where it has moved, back to what was agreed on."""
    held, own = state.outer[number], parts_of(state.model, fragment, trainable)
    sent = {
        piece.name: jax.vmap(partial(encode, exchange=config.exchange, scaled=piece.scaled))(
            held.params[piece.name] - own[piece.name]
        )
        for piece in fragment
    }
    return _with_agreed(state, number, Agreed(held.params, held.momentum, sent))


def _receive(
    state: TrainState,
    gathered: Sent | None,
    *,
    number: int,
    fragment: Fragment,
    config: DiLoCoConfig,
    trainable: Trainable,
    mesh: Mesh | None,
) -> TrainState:
    """The state behind the outer step of a fragment, which each replica has taken in."""
    held = state.outer[number]
    sent = _gather(held.sent, mesh) if gathered is None else gathered

    def gradient(name: str) -> Array:
        params = held.params[name]
        one = partial(decode, width=params.shape[-1] if params.ndim else 1, dtype=params.dtype)
        return jnp.mean(jax.vmap(one)(sent[name]), axis=0)

    grads = {piece.name: gradient(piece.name) for piece in fragment}
    updates, momentum = outer_optimizer(config).update(grads, held.momentum)
    params = optax.apply_updates(held.params, updates)
    mixed = change_parts(
        state.model, fragment, trainable,
        lambda name, own: config.mixing * own + (1 - config.mixing) * params[name],
    )  # fmt: skip
    return _with_agreed(dataclasses.replace(state, model=mixed), number, Agreed(params, momentum, held.sent))


def _with_agreed(state: TrainState, number: int, agreed: Agreed) -> TrainState:
    outer = (*state.outer[:number], agreed, *state.outer[number + 1 :])
    return dataclasses.replace(state, outer=outer)
