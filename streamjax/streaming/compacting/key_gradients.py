"""How much a text's loss minds what is lost of each token's keys and values: squares of its gradients (Fisher)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from streamjax.attention.dispatch import sequence_attention
from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import Attention, SequenceContext
from streamjax.models.rope import make_rotary


def key_gradients(
    model: Decoder, ids: Int[Array, "B T"]
) -> list[tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]]:
    """Of every layer's keys before rotation, and of its values, the gradients of the text's summed nats.

    A layer at a time, backwards, from its input, which is kept: no layer's attention weights are.

    Args:
      model: whose layers are attention, without a mixer or a memory beside it.
      ids: rows, each read by itself from position 0.
    """
    context, inputs, x = SequenceContext.from_start(*ids.shape), [], model.embed(ids)
    for i in range(model.config.num_layers):
        inputs.append(x)
        x = _layer(model.layer(i), x, context, *_nothing(model.layer(i), x))
    pulled, found = _pulled_by_loss(model, x, ids), []
    for i in reversed(range(model.config.num_layers)):
        pulled, *own = _pulled_through(model.layer(i), inputs.pop(), context, pulled)
        found.append((own[0], own[1]))
    return found[::-1]


def unrotated(block: Block, k: Float[Array, "B T K D"], context: SequenceContext) -> Float[Array, "B T K D"]:
    """A layer's rotated keys, or their gradients, turned back to position 0; what rotation scales stays scaled."""
    config = block.attention.config
    if config.rope is None:
        return k
    rotary = make_rotary(config.rope, config.head_dim, context.length)
    return jnp.swapaxes(rotary.moved(jnp.swapaxes(k, 1, 2), -context.position[:, None]), 1, 2)


def _nothing(block: Block, x: Float[Array, "B T E"]) -> tuple[Array, Array]:
    config = block.attention.config
    assert isinstance(config, AttentionConfig)
    zeros = jnp.zeros((*x.shape[:2], config.num_kv_heads, config.head_dim), x.dtype)
    return zeros, zeros


@jax.jit
def _layer(
    block: Block,
    x: Float[Array, "B T E"],
    context: SequenceContext,
    more_k: Float[Array, "B T K D"],
    more_v: Float[Array, "B T K D"],
) -> Float[Array, "B T E"]:
    """The layer with something added to its rotated keys and to its values."""
    mixer = block.mixer
    assert isinstance(mixer, Attention)
    q, k, v = block.project(x, context)
    config = mixer.config
    heads = sequence_attention(
        q, k + more_k, v + more_v, config.pattern, scale=config.softmax_scale, softcap=config.softcap,
        slopes=mixer.slopes(), sink_logits=mixer.learned_sinks(), implementation="xla",
    )  # fmt: skip
    return block.combine(x, heads)


@jax.jit
def _pulled_through(
    block: Block, x: Float[Array, "B T E"], context: SequenceContext, pulled: Float[Array, "B T E"]
) -> tuple[Float[Array, "B T E"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """The loss's gradients by a layer's input, its keys before rotation and its values, from that by its output."""
    _, pull = jax.vjp(lambda x, k, v: _layer(block, x, context, k, v), x, *_nothing(block, x))
    of_x, of_k, of_v = pull(pulled)
    return of_x, unrotated(block, of_k, context), of_v


@jax.jit
def _pulled_by_loss(model: Decoder, x: Float[Array, "B T E"], ids: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """The gradient of the summed nats by what the last layer gives, a row at a time."""

    def nats(x: Float[Array, "T E"], ids: Int[Array, " T"]) -> Array:
        logits = model.logits(model.norm(x[None, :-1]))[0]
        chosen = jnp.take_along_axis(logits, ids[1:, None], axis=-1)[:, 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen)

    return jax.lax.map(lambda row: jax.grad(nats)(row[0], row[1]), (x, ids))
