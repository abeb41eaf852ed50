"""One layer over a stretch of sequences that several devices share, forwards and backwards, for the layer order.

A layer is token by token but for its mixers. So it has three parts: what mixers read (of attention queries, keys and
values), which is made chunk by chunk; the mixers, which go over the devices as they do where nothing is cut (a ring,
gathered keys, a halo, states of stretches); and what is behind them, the MLP with it, chunk by chunk again. Backwards
the parts are made and pulled back in turn. Of a whole stretch there is what mixers read and give, and its gradient; all
else of a layer exists for one chunk at a time. It is StreamBP (2506.03077) with attention for all chunks at once,
because each visit to another device's keys costs as much for one chunk as for all.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from streamjax.attention.dispatch import sequence_attention
from streamjax.attention.sharded import as_stretches
from streamjax.models.block import Block
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.training.backprop.context.stretch import Stretch
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.sequence_chunks import add, chunk_at, zeros_like
from streamjax.training.backprop.storage.activation_store import ActivationReader
from streamjax.training.backprop.trainable_parameters import combine

Chunks = Float[Array, "N B C E"]
Tree = TypeVar("Tree")


def stretch_forward(block: Block, x: Chunks, sequence: Stretch) -> Chunks:
    """A layer over all chunks of this device; each output takes its input's place."""
    read = jax.lax.map(lambda i: before_mixing(block, chunk_at(x, i), sequence, i), jnp.arange(sequence.count))
    mixed = mix(block, read, sequence)

    def chunk(i: Any, x: Chunks) -> Chunks:
        y = after_mixing(block, chunk_at(x, i), _take(mixed, i))
        return jax.lax.dynamic_update_index_in_dim(x, y, i, 0)

    return jax.lax.fori_loop(0, sequence.count, chunk, x)


def stretch_backward(
    params: Block, rest: Block, inputs: ActivationReader, d_y: Chunks, sequence: Stretch, options: GradientOptions
) -> tuple[Block, Chunks]:
    """Gradient of a layer's trained parameters from this device's chunks, and the cotangent of its input in the place
    of that of its output."""

    def before(params: Block, x: Array, i: Any) -> Any:
        return before_mixing(combine(params, rest), x, sequence, i)

    def fill(i: Any, x: Array, read: Any) -> Any:
        return _put(read, before(params, x, i), i)

    shape = jax.eval_shape(before, params, d_y[0], 0)
    empty = jax.tree.map(lambda one: jnp.zeros((sequence.count, *one.shape), one.dtype), shape)
    read = inputs.each(fill, empty)
    mixed, pull_mixing = jax.vjp(lambda params, read: mix(combine(params, rest), read, sequence), params, read)

    def behind(i: Any, x: Array, carry: tuple[Block, Chunks, Any]) -> tuple[Block, Chunks, Any]:
        total, d_y, mixed = carry
        _, pull = jax.vjp(lambda p, x, mixed: after_mixing(combine(p, rest), x, mixed), params, x, _take(mixed, i))
        part, d_x, d_mixed = pull(chunk_at(d_y, i))
        return add(total, part), jax.lax.dynamic_update_index_in_dim(d_y, d_x, i, 0), _put(mixed, d_mixed, i)

    total, d_x, d_mixed = inputs.each_back(behind, (zeros_like(params, options.grad_dtype), d_y, mixed))
    part, d_read = pull_mixing(d_mixed)

    def in_front(i: Any, x: Array, carry: tuple[Block, Chunks]) -> tuple[Block, Chunks]:
        total, d_x = carry
        _, pull = jax.vjp(lambda p, x: before(p, x, i), params, x)
        part, more = pull(_take(d_read, i))
        return add(total, part), jax.lax.dynamic_update_index_in_dim(d_x, chunk_at(d_x, i) + more, i, 0)

    return inputs.each(in_front, (add(total, part), d_x))


def before_mixing(block: Block, x: Float[Array, "B C E"], sequence: Stretch, i: Any) -> Any:
    """What the mixers read of chunk i, token by token: queries, keys and values, or the mixer's input, or all four."""
    read: tuple[Array, ...] = ()
    if not isinstance(block.mixer, RecurrentMixer):
        read = block.project(x, sequence.context(i))
    return read if read and block.beside is None else (*read, block.mixer_input(x))


def mix(block: Block, read: Any, sequence: Stretch) -> Any:
    """What the mixers make of a stretch, from what they read of its chunks: the heads' outputs, what a recurrent mixer
    gives, or both."""
    found: list[Any] = []
    attended: list[Any] = [_joined(x) for x in read]
    context = sequence.all_chunks()
    beside = None if len(attended) == 3 else attended.pop()
    with as_stretches():
        if attended:
            q, k, v = attended
            config = block.attention.config
            heads = sequence_attention(
                q,
                k,
                v,
                config.pattern,
                scale=config.softmax_scale,
                segment_ids=context.segment_ids,
                softcap=config.softcap,
                slopes=block.attention.slopes(),
                sink_logits=block.attention.learned_sinks(),
                exchange=context.exchange,
            )
            # Without a gate, what is behind rounds it as its first step.
            gated = getattr(config, "output_gate", False)
            found.append(heads if gated else heads.astype(q.dtype))
        if beside is not None:
            recurrent = block.mixer if block.beside is None else block.beside
            assert isinstance(recurrent, RecurrentMixer)
            found.append(recurrent.parallel(beside, context))
    return tuple(_cut(x, sequence) for x in found)


def after_mixing(block: Block, x: Float[Array, "B C E"], mixed: Any) -> Float[Array, "B C E"]:
    """The layer's output for a chunk."""
    if isinstance(block.mixer, RecurrentMixer):
        return block.join(x, *mixed)
    heads, *beside = mixed
    return block.combine(x, heads, None, *beside)


def _joined(x: Float[Array, "N B C ..."]) -> Float[Array, "B NC ..."]:
    return rearrange(x, "n b c ... -> b (n c) ...")


def _cut(x: Float[Array, "B NC ..."], sequence: Stretch) -> Float[Array, "N B C ..."]:
    return rearrange(x, "b (n c) ... -> n b c ...", n=sequence.count)


def _take(tree: Tree, i: Any) -> Tree:
    return jax.tree.map(lambda x: chunk_at(x, i), tree)


def _put(tree: Tree, part: Tree, i: Any) -> Tree:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), tree, part)
