"""Between a decoder's two layouts: one module a layer, or layers stacked by period for a scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32

from streamjax.models.decoder import Block, Decoder


def unstack_layers(model: Decoder) -> Decoder:
    """The same model with one module a layer: what decoding reads without copies."""
    layers = [model.layer(i) for i in range(model.config.num_layers)]
    return with_layers(model, [], layers)


def stack_layers(model: Decoder) -> Decoder:
    """The same model with repeating layers stacked: what a scan over layers walks. As it is with a chunk memory."""
    period, repeats = model.config.period, model.config.repeats
    if not repeats:
        return model
    layers = [model.layer(i) for i in range(model.config.num_layers)]
    stack = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[i : repeats * period : period]) for i in range(period)
    ]
    return with_layers(model, stack, layers[repeats * period :])


def layer_of(block: Block, row: int | Int32[Array, ""] | None) -> Block:
    """The layer that `Decoder.layer_and_row` has found, inside a program: `row` of a stack, or the block itself."""
    if row is None:
        return block
    found: Block = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False), block)
    return found


def without_layers(model: Decoder) -> Decoder:
    """The model's two ends: embedding, last norm and output."""
    return with_layers(model, [], [])


def with_layers(model: Decoder, stack: list, layers: list) -> Decoder:
    """A copy of the model with other layers, or trees in their places."""
    leaves, structure = jax.tree.flatten(model)
    copy: Decoder = jax.tree.unflatten(structure, leaves)
    copy.stack, copy.layers = nnx.List(stack), nnx.List(layers)
    return copy
