"""Layers that learn, each by itself, what the layers in their places do in another model.

The second stage of MOHAWK (2408.10189), and the first of LoLCATs (2410.10254) and InfiniteVL (2512.08829): a new mixer
reads what the teacher's layer reads, and is to make of it what the teacher's mixer makes. No gradient flows from layer
to layer, so a layer's activations exist by themselves, and errors of lower layers do not reach upper ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.barriers import ordered_after
from streamjax.models.block import Block
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import stack_layers, unstack_layers
from streamjax.models.mixers.attention import SequenceContext
from streamjax.training.backprop.trainable_parameters import Trainable, combine, partition
from streamjax.training.objectives.objective import Batch, require_no_prefix


def sequence_context(batch: Batch) -> SequenceContext:
    """Where the tokens of a batch stand."""
    require_no_prefix(batch)
    tokens = batch["tokens"]
    positions = batch["positions"] if "positions" in batch else jnp.arange(tokens.shape[1])
    return SequenceContext(
        jnp.broadcast_to(positions, tokens.shape).astype(jnp.uint32), batch.get("segment_ids"), tokens.shape[1]
    )


def layer_examples(
    teacher: Decoder, batch: Batch, layers: tuple[int, ...]
) -> tuple[Float[Array, "B L T E"], Float[Array, "B L T E"]]:
    """What some layers of a model read, and what their token mixers make of it."""
    context, plain = sequence_context(batch), unstack_layers(teacher)
    x, inputs, outputs = plain.embed(batch["tokens"]), [], []
    for index in range(max(layers) + 1):
        block = plain.layers[index]
        mixed = block.mix(x, context)
        if index in layers:
            inputs.append(x)
            outputs.append(mixed)
        x = block.join(x, mixed)
    return jnp.stack(inputs, axis=1), jnp.stack(outputs, axis=1)


def layer_error(
    block: Block,
    x: Float[Array, "B T E"],
    wanted: Float[Array, "B T E"],
    weights: Float[Array, "B T"],
    context: SequenceContext,
) -> Float[Array, ""]:
    """The squared error of what a layer's mixers make of `x`, as a share of the square of what they are to make.

    Tokens of weight 0 do not count.
    """
    made, counted = block.mix(x, context).astype(wanted.dtype), (weights != 0)[..., None]
    error, whole = (jnp.sum(jnp.where(counted, jnp.square(y), 0.0)) for y in (made - wanted, wanted))
    return error / jnp.where(whole > 0, whole, 1.0)


@partial(jax.jit, static_argnames="layers")
def alignment_loss(model: Decoder, batch: Mapping[str, Array], layers: tuple[int, ...]) -> Float[Array, ""]:
    """The mean of `layer_error` over L layers of a student, in order.

    A batch has tokens and weights, [B, T]; layer_inputs and layer_outputs, [B, L, T, E], as `layer_examples` gives
    them; segment_ids and positions, [B, T], if packed.
    """
    return alignment_loss_and_grad(model, batch, layers, trainable=())[0]


@partial(jax.jit, static_argnames=("layers", "trainable"))
def alignment_loss_and_grad(
    model: Decoder, batch: Mapping[str, Array], layers: tuple[int, ...], trainable: Trainable = nnx.Param
) -> tuple[Float[Array, ""], Decoder]:
    """`alignment_loss` and its gradient, shaped as the model; None in it for what is not trained.

    Layers come one after another. They need not, but then the activations of all would exist at once.
    """
    context, plain, wide = sequence_context(batch), unstack_layers(model), accumulator(model.dtype)
    total = jnp.zeros((), wide)
    params = partition(plain, trainable)[0]
    grads = jax.tree.map(jnp.zeros_like, params)
    for place, index in enumerate(layers):
        own, rest = partition(plain.layers[index], trainable)
        x = batch["layer_inputs"][:, place].astype(model.dtype)
        x = ordered_after(x, jnp.broadcast_to(total, (x.shape[0], 1)))
        wanted = batch["layer_outputs"][:, place].astype(wide)

        def error(own: Block, rest: Block = rest, x: Array = x, wanted: Array = wanted) -> Array:
            return layer_error(combine(own, rest), x, wanted, batch["weights"], context) / len(layers)

        part, found = jax.value_and_grad(error)(own)
        # The next layer waits for the last of these sums.
        waited = sum((jnp.sum(leaf) for leaf in jax.tree.leaves(found)), jnp.zeros((), wide))
        total = ordered_after((total + part)[None], waited[None, None])[0]
        grads.layers[index] = found
    return total, stack_layers(grads) if len(model.stack) else grads
