"""Least decays that are learned by all layers together, as HGRN (2311.04823) and HGRN2 (2404.07904) have them.

One table has a row a layer. Its softmax over the layers cuts the way from 0 to 1 in as many steps, for each channel
apart, and a layer's least decay is the sum of the steps of the layers below it but for the first one's: 0 in the first
layer, and the higher a layer, the nearer to 1 (2311.04823, section 3.2, "lower bound").

A layer knows its own row alone, and its bound depends on all of them. So bounds are given to the layers where a model
is read (`with_bounds`), and lie nowhere else: what is stored and trained is the table. Chunked backprop differentiates
by what the layers were given, and `table_gradient` takes that back to the table.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.models.parameters import zeros

Model = TypeVar("Model", bound=nnx.Module)  # a decoder, or a tree shaped as one

_NOTHING = -1e30  # the logarithm of no share at all: finite, so that no gradient is 0 times infinity


class LearnedBounds(nnx.Module):
    """`table` [L, G, K]: a logit for each of L layers and the K channels of G groups; zeros are even steps."""

    def __init__(self, shape: tuple[int, ...], dtype: jnp.dtype):
        self.table = zeros(shape, ("latent", "kv_heads", "head_dim"), dtype)

    def __call__(self) -> Float[Array, "L 2 G K"]:
        """Logarithms of every layer's least decay, and of what is left of 1."""
        table = self.table[...]
        steps = jax.nn.log_softmax(table.astype(accumulator(table.dtype)), axis=0)
        nothing = jnp.full_like(steps[:1], _NOTHING)
        below = jax.lax.cumlogsumexp(steps[1:], axis=0)
        above = jax.lax.cumlogsumexp(steps[1:], axis=0, reverse=True)
        above = jnp.concatenate((above[1:], nothing[: len(above)]))  # of the layers above each but the first
        bounds = jnp.concatenate((nothing, below))
        rest = jnp.concatenate((jnp.zeros_like(nothing), jnp.logaddexp(steps[:1], above)))
        return jnp.stack((bounds, rest), axis=1)


def with_bounds(model: Model) -> Model:
    """The model with each layer's least decays where the layer reads them, in the table's place; its arrays are shared.

    A model that has no table, or none any more, is returned as it is.
    """
    table: LearnedBounds | None = getattr(model, "bounds", None)
    if table is None:
        return model
    copy: Any = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
    copy.bounds = nnx.data(None)
    bounds, kind = table(), type(table.table)
    for block, rows, stacked in _blocks(copy):
        own = bounds[jnp.asarray(rows)] if stacked else bounds[rows[0]]
        block.mixer.bound = kind(own, axes=("gates", "kv_heads", "head_dim"))
    found: Model = copy
    return found


def table_gradient(model: Model, grads: Model) -> Model:
    """The gradient of a model from that of `with_bounds(model)`: what its layers were given is taken to the table."""
    table: LearnedBounds | None = getattr(model, "bounds", None)
    if table is None:
        return grads
    bounds, pull = jax.vjp(lambda table: table(), table)
    total, trained = jnp.zeros_like(bounds), True
    copy: Any = jax.tree.unflatten(jax.tree.structure(grads), jax.tree.leaves(grads))
    for block, rows, stacked in _blocks(copy):
        given, block.mixer.bound = block.mixer.bound, nnx.data(None)
        if given is None or given.get_value() is None:
            trained = False
            continue
        own = given[...].astype(total.dtype)
        total = total.at[jnp.asarray(rows)].add(own if stacked else own[None])
    nothing = jax.tree.map(lambda _: None, table, is_leaf=lambda node: isinstance(node, nnx.Variable))
    copy.bounds = pull(total)[0] if trained else nothing
    found: Model = copy
    return found


def _blocks(model: Any) -> list[tuple[Any, list[int], bool]]:
    """Every layer or stack of layers that learns bounds, its rows of the table, and whether it is a stack."""
    numbers = {layer: row for row, layer in enumerate(model.config.bounded_layers)}
    period, stacked = len(model.stack), model.stacked_layers
    places = [(block, range(i, stacked, period), True) for i, block in enumerate(model.stack)]
    places += [(block, range(i, i + 1), False) for i, block in enumerate(model.layers, stacked)]
    return [(block, [numbers[i] for i in own], many) for block, own, many in places if own[0] in numbers]
