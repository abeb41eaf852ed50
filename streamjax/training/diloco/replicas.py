"""The state of a run by Streaming DiLoCo: every array of every replica, and what they have agreed on.

A replica's arrays are the rows of arrays [R, ...] that the mesh axis `replica` splits, and the other axes as ever. What
all have agreed on, the parameters that outer steps have made and their momentum, is the same for all.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from streamjax.checkpoints.pytrees import named_arrays
from streamjax.models.decoder import Decoder
from streamjax.parallel.mesh import shardings
from streamjax.parallel.rules import axes_of, partition_spec
from streamjax.training.backprop.trainable_parameters import Trainable
from streamjax.training.diloco.config import DiLoCoConfig
from streamjax.training.diloco.fragments import fragments_of, mean_over_replicas, parts_of
from streamjax.training.diloco.messages import Message, encode
from streamjax.training.run.state import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Agreed:
    """Of one fragment: parameters that the last outer step has made, its momentum, and what was sent last.

    sent: a message of each replica [R, ...] for each parameter. It is in the state for those that are on their way.
    """

    params: dict[str, Any]
    momentum: Any
    sent: dict[str, Message]


def outer_optimizer(config: DiLoCoConfig) -> optax.GradientTransformation:
    """The outer step: stochastic gradient descent with Nesterov's momentum."""
    return optax.sgd(config.outer_learning_rate, config.outer_momentum or None, nesterov=bool(config.outer_momentum))


def replicate(state: TrainState, config: DiLoCoConfig, trainable: Trainable, mesh: Mesh | None) -> TrainState:
    """All replicas at the state of an ordinary run before its first step.

    Raises:
      ValueError: more fragments than layers, or replicas that the mesh does not divide.
    """
    check_replicas(config.replicas, mesh)
    fragments = fragments_of(state.model, config.fragments, trainable)
    optimizer = outer_optimizer(config)

    def build(state: TrainState) -> TrainState:
        model, inner, skips = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (config.replicas, *x.shape)), (state.model, state.opt_state, state.skips)
        )
        agreed = []
        for fragment in fragments:
            params = parts_of(state.model, fragment, trainable, replicas=False)
            nothing = {
                piece.name: jax.vmap(lambda x, piece=piece: encode(x, config.exchange, piece.scaled))(
                    jnp.zeros((config.replicas, *params[piece.name].shape), params[piece.name].dtype)
                )
                for piece in fragment
            }
            agreed.append(Agreed(params, optimizer.init(params), nothing))
        return TrainState(model, inner, state.step, outer=tuple(agreed), skips=skips)

    return jax.jit(build, out_shardings=placement(jax.eval_shape(build, state), mesh))(state)


def check_replicas(replicas: int, mesh: Mesh | None) -> None:
    """Raise ValueError where the mesh axis `replica` does not divide the replicas."""
    along = 1 if mesh is None else mesh.shape.get("replica", 1)
    if replicas % along:
        raise ValueError(
            f"diloco.replicas is {replicas}, and mesh.replica {along}: each device along it has equally many, so "
            f"make it a divisor of {replicas}"
        )


def placement(state: TrainState, mesh: Mesh | None) -> Any:
    """Where each array of a state of replicas lies on the mesh; None without one."""
    if mesh is None:
        return None
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (state.model, state.opt_state))
    replicas = jax.tree.leaves(state.model)[0].shape[0]
    (along,) = partition_spec(("replica",), (replicas,), mesh)

    def with_replicas(place: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(along, *place.spec))

    of_one = shardings(one[0], mesh)
    model, opt_state = jax.tree.map(with_replicas, (of_one, shardings(one[1], mesh)))
    whole, by_name = NamedSharding(mesh, PartitionSpec()), named_arrays(of_one)

    def of_message(name: str, x: Any) -> NamedSharding:
        """As the parameter lies, in the dimensions in which its message can be split so."""
        spec = (*by_name[name].spec, *(None,) * x.ndim)[: x.ndim - 1]
        sizes = [math.prod(mesh.shape[axis] for axis in axes_of(entry)) for entry in spec]
        fits = [e if n % size == 0 else None for e, size, n in zip(spec, sizes, x.shape[1:], strict=True)]
        return NamedSharding(mesh, PartitionSpec(along, *fits))

    def of_fragment(held: Agreed) -> Agreed:
        params = {name: by_name[name] for name in held.params}

        def are_params(node: Any) -> bool:
            return isinstance(node, dict)

        momentum = jax.tree.map(lambda x: params if are_params(x) else whole, held.momentum, is_leaf=are_params)
        sent = {name: jax.tree.map(partial(of_message, name), message) for name, message in held.sent.items()}
        return Agreed(params, momentum, sent)

    agreed = tuple(map(of_fragment, state.outer))
    skips = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec(along)), state.skips)
    return TrainState(model, opt_state, whole, outer=agreed, skips=skips)  # type: ignore


def count_replicas(state: TrainState) -> int:
    """How many replicas a state has; 0 for one of an ordinary run."""
    return 0 if state.outer is None else int(jax.tree.leaves(state.model)[0].shape[0])


def resized(state: TrainState, replicas: int, mesh: Mesh | None) -> TrainState:
    """The state with another number of replicas: the first ones, and copies of them, from the first one on."""
    if count_replicas(state) == replicas:
        return state
    build = partial(_with_rows, rows=np.arange(replicas) % count_replicas(state))
    return jax.jit(build, out_shardings=placement(jax.eval_shape(build, state), mesh))(state)


def shapes_with(state: TrainState, replicas: int, mesh: Mesh | None) -> TrainState:
    """Shapes and places of the arrays that the state has with another number of replicas."""
    shapes = jax.eval_shape(partial(_with_rows, rows=np.zeros(replicas, int)), state)
    places = placement(shapes, mesh)
    if places is None:
        places = jax.tree.map(lambda _: state.step.sharding, shapes)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def _with_rows(state: TrainState, rows: np.ndarray) -> TrainState:
    def pick(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[rows], tree)

    agreed = tuple(dataclasses.replace(held, sent=pick(held.sent)) for held in state.outer)
    of_replicas = pick({"model": state.model, "opt_state": state.opt_state, "skips": state.skips})
    return dataclasses.replace(state, outer=agreed, **of_replicas)


@jax.jit
def _mean_model(model: Decoder) -> Decoder:
    return mean_over_replicas(model)


def one_model(state: TrainState) -> Decoder:
    """The model of a run: of several replicas the mean, which evaluation and export take."""
    return state.model if state.outer is None else _mean_model(state.model)
