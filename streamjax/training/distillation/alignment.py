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
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import unstack_layers
from streamjax.models.mixers.attention import SequenceContext
from streamjax.training.backprop.trainable_parameters import Trainable, combine, partition
from streamjax.training.objectives.objective import Batch


def sequence_context(batch: Batch) -> SequenceContext:
    """Where the tokens of a batch stand."""
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
        if index in layers:
            inputs.append(x)
            outputs.append(block.mix(x, context))
        if index < max(layers):
            x, _ = block.parallel(x, context)
    return jnp.stack(inputs, axis=1), jnp.stack(outputs, axis=1)


def alignment_loss(model: Decoder, batch: Batch, layers: tuple[int, ...]) -> Float[Array, ""]:
    """The mean over layers of the squared error of what their mixers make, as a share of what they are to make.

    Args:
      model: the student.
      batch: tokens [B, T] and weights [B, T]; layer_inputs and layer_outputs [B, L, T, E], as `layer_examples` gives
        them; segment_ids and positions [B, T] if packed. Tokens of weight 0 do not count.
      layers: L layers of the student, in order.
    """
    context, plain = sequence_context(batch), unstack_layers(model)
    wide = accumulator(model.dtype)
    counted = (batch["weights"] != 0)[..., None]
    errors = []
    for place, index in enumerate(layers):
        wanted = batch["layer_outputs"][:, place].astype(wide)
        made = jax.checkpoint(lambda block, x: block.mix(x, context))(
            plain.layers[index], batch["layer_inputs"][:, place].astype(model.dtype)
        )
        error = jnp.where(counted, jnp.square(made.astype(wide) - wanted), 0.0)
        whole = jnp.sum(jnp.where(counted, jnp.square(wanted), 0.0))
        errors.append(jnp.sum(error) / jnp.where(whole > 0, whole, 1.0))
    return jnp.mean(jnp.stack(errors))


@partial(jax.jit, static_argnames=("layers", "trainable"))
def alignment_loss_and_grad(
    model: Decoder, batch: Mapping[str, Array], layers: tuple[int, ...], trainable: Trainable = nnx.Param
) -> tuple[Float[Array, ""], Decoder]:
    """`alignment_loss` and its gradient, shaped as the model; None in it for what is not trained."""
    params, rest = partition(model, trainable)
    return jax.value_and_grad(lambda params: alignment_loss(combine(params, rest), batch, layers))(params)
