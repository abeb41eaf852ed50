"""Which parameters make up a fragment: layers dealt out in turn, the two ends of the model with the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from streamjax.models.decoder import Decoder
from streamjax.training.backprop.trainable_parameters import Trainable, combine, is_parameter, partition


class Piece(NamedTuple):
    """A part of a parameter: layers of a stack, or all of it.

    place: of the parameter among the model's trained ones. rows: of the stack; all where None.
    scaled: its first dimensions, without that of replicas, whose indices have scales of their own in a message.
    """

    name: str
    place: int
    rows: tuple[int, ...] | None
    scaled: int

    def of(self, x: Shaped[Array, "..."], replicas: bool = True) -> Shaped[Array, "..."]:
        """This part of a parameter. replicas: of [R, ...] of all replicas."""
        if self.rows is None:
            return x
        rows = np.asarray(self.rows)
        return x[:, rows] if replicas else x[rows]

    def put(self, x: Shaped[Array, "R ..."], part: Shaped[Array, "R ..."]) -> Shaped[Array, "R ..."]:
        """The parameter of all replicas with another part."""
        return part if self.rows is None else x.at[:, np.asarray(self.rows)].set(part)


Fragment = tuple[Piece, ...]


def fragments_of(model: Decoder, count: int, trainable: Trainable) -> tuple[Fragment, ...]:
    """The trained parameters of a model (of one replica, or of all) in `count` fragments; layer i is in `i % count`.

    Raises:
      ValueError: fewer layers than fragments.
    """
    layers = model.config.num_layers
    if count > layers:
        raise ValueError(f"diloco.fragments is {count}, and the model has {layers} layers: use at most {layers}")
    params, _ = partition(model, trainable)
    found: list[list[Piece]] = [[] for _ in range(count)]
    variables = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_parameter)[0]
    place = 0
    for path, variable in variables:
        leaves = len(jax.tree.leaves(variable))
        if not leaves:
            continue
        assert leaves == 1, "trained parameters are arrays"
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        width = len(variable.get_metadata("axes"))
        top, *rest = name.split(".")
        if top == "stack":
            repeats = model.config.repeats
            numbers = np.arange(repeats) * len(model.stack) + int(rest[0])
            for number in range(count):
                rows = tuple(np.flatnonzero(numbers % count == number).tolist())
                if rows:
                    found[number].append(Piece(name, place, rows, 1 + (width > 1)))
        else:
            layer = model.stacked_layers + int(rest[0]) if top == "layers" else count - 1
            found[layer % count].append(Piece(name, place, None, int(width > 1)))
        place += 1
    return tuple(tuple(pieces) for pieces in found)


def parts_of(model: Decoder, fragment: Fragment, trainable: Trainable, replicas: bool = True) -> dict[str, Any]:
    """The parameters of a fragment by name. replicas: of [R, ...] of all replicas."""
    leaves = jax.tree.leaves(partition(model, trainable)[0])
    return {piece.name: piece.of(leaves[piece.place], replicas) for piece in fragment}


def change_parts(
    model: Decoder, fragment: Fragment, trainable: Trainable, change: Callable[[str, Array], Array]
) -> Decoder:
    """The model of all replicas with `change(name, part)` in the place of each part of a fragment."""
    params, rest = partition(model, trainable)
    leaves, structure = jax.tree.flatten(params)
    for piece in fragment:
        leaves[piece.place] = piece.put(leaves[piece.place], change(piece.name, piece.of(leaves[piece.place])))
    return combine(jax.tree.unflatten(structure, leaves), rest)


def mean_over_replicas(model: Decoder) -> Decoder:
    """One model of those of all replicas [R, ...]: the mean of what differs in them."""

    def mean(x: Array) -> Array:
        is_number = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.mean(x, axis=0, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype) if is_number else x[0]

    return jax.tree.map(mean, model)
