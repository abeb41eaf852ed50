"""One layer over a stretch of sequences that several devices share, forwards and backwards, for the layer order.

A layer is token by token but for its mixers. So it has three parts: what mixers read (of attention queries, keys and
values), which is made chunk by chunk; the mixers, which go over the devices as they do where nothing is cut (a ring,
gathered keys, a halo, states of stretches); and what is behind them, the MLP with it, chunk by chunk again. Backwards
the parts are made and pulled back in turn. Of a whole stretch there is what mixers read and give, and its gradient; all
else of a layer exists for one chunk at a time. It is StreamBP (2506.03077) with attention for all chunks at once,
because each visit to another device's keys costs as much for one chunk as for all.

Chunk memories are read likewise: queries chunk by chunk, pages by all of a stretch at once, which go round, and what is
behind chunk by chunk. A device keeps the pages that end in its stretch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from pallas_kernels.partial import Partial
from streamjax.attention.context.landmarks import cut_pages, pages_over_devices
from streamjax.attention.context.sequence import context_attention, found_attention
from streamjax.attention.dispatch import sequence_attention
from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.attention.landmarks.page_forms import by_blocks
from streamjax.attention.sharded import as_stretches
from streamjax.models.block import Block
from streamjax.models.mixers.hierarchical import ReadablePages
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.training.backprop.context.stretch import Stretch
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.sequence_chunks import add, chunk_at, zeros_like
from streamjax.training.backprop.storage.activation_store import ActivationReader
from streamjax.training.backprop.trainable_parameters import combine

Chunks = Float[Array, "N B C E"]
Tree = TypeVar("Tree")


def stretch_forward(
    block: Block,
    x: Chunks,
    sequence: Stretch,
    memory: LandmarkPages | None = None,
    known: bool = False,
    keep: bool = False,
) -> tuple[Chunks, LandmarkPages | None, Partial | None]:
    """A layer over all chunks of this device; each output takes its input's place.

    `memory`: this device's pages of what the layer reads. A layer that makes them returns its own, unless they are
    `known`. Third is what attention found, [N, B, C, ...], each device's in an order of its own; if it is to `keep`
    that, and of attention that goes over all devices.
    """
    if block.encoder is not None and not known:
        memory = encode_stretch(block, x, sequence)
    read = jax.lax.map(lambda i: before_mixing(block, chunk_at(x, i), sequence, i), jnp.arange(sequence.count))
    found = find(block, read, sequence) if keep else None
    mixed = mix(block, read, sequence, found)
    if block.reader is not None and memory is not None:
        asked = jax.lax.map(lambda i: ask(block, chunk_at(x, i), _take(mixed, i)), jnp.arange(sequence.count))
        mixed = (*mixed, read_pages(block, asked, memory, sequence))

    def chunk(i: Any, x: Chunks) -> Chunks:
        y = after_mixing(block, chunk_at(x, i), _take(mixed, i))
        return jax.lax.dynamic_update_index_in_dim(x, y, i, 0)

    return jax.lax.fori_loop(0, sequence.count, chunk, x), memory, found


def stretch_backward(
    params: Block,
    rest: Block,
    inputs: ActivationReader,
    d_y: Chunks,
    sequence: Stretch,
    options: GradientOptions,
    memory: LandmarkPages | None = None,
    d_memory: LandmarkPages | None = None,
    kept: ActivationReader | None = None,
) -> tuple[Block, Chunks, LandmarkPages | None]:
    """Gradient of a layer's trained parameters from this device's chunks, and the cotangent of its input in the place
    of that of its output; `d_memory` with what the layer adds to the gradients of the pages that it reads.

    kept: what attention found of each chunk, if that was kept.
    """

    def before(params: Block, x: Array, i: Any) -> Any:
        return before_mixing(combine(params, rest), x, sequence, i)

    def asks(params: Block, x: Array, mixed: Any) -> Any:
        return ask(combine(params, rest), x, mixed)

    read = _each(inputs, lambda i, x: before(params, x, i), jax.eval_shape(before, params, d_y[0], 0))
    attended = None
    if kept is not None:
        read_one = kept.away if kept.away is not None and kept.split else kept.here
        attended = _each(kept, lambda i, x: x, jax.eval_shape(read_one, 0))
    mixed, pull_mixing = jax.vjp(
        lambda params, read: mix(combine(params, rest), read, sequence, attended), params, read
    )
    found, pull_pages = mixed, None
    if rest.reader is not None and memory is not None:
        shape = jax.eval_shape(asks, params, d_y[0], _take(mixed, 0))
        asked = _each(inputs, lambda i, x: asks(params, x, _take(mixed, i)), shape)
        heads, pull_pages = jax.vjp(
            lambda asked, memory: read_pages(combine(params, rest), asked, memory, sequence), asked, memory
        )
        found = (*mixed, heads)

    def behind(i: Any, x: Array, carry: tuple[Block, Chunks, Any]) -> tuple[Block, Chunks, Any]:
        total, d_y, found = carry
        _, pull = jax.vjp(lambda p, x, found: after_mixing(combine(p, rest), x, found), params, x, _take(found, i))
        part, d_x, d_found = pull(chunk_at(d_y, i))
        return add(total, part), jax.lax.dynamic_update_index_in_dim(d_y, d_x, i, 0), _put(found, d_found, i)

    total, d_x, d_mixed = inputs.each_back(behind, (zeros_like(params, options.grad_dtype), d_y, found))
    if pull_pages is not None:
        *d_mixed, d_heads = d_mixed
        d_asked, d_pages = pull_pages(d_heads)
        d_memory = None if d_memory is None else add(d_memory, d_pages)

        def in_question(i: Any, x: Array, carry: tuple[Block, Chunks, Any]) -> tuple[Block, Chunks, Any]:
            total, d_x, d_mixed = carry
            _, pull = jax.vjp(asks, params, x, _take(mixed, i))
            part, more, d_more = pull(_take(d_asked, i))
            d_mixed = _put(d_mixed, jax.tree.map(jnp.add, _take(d_mixed, i), d_more), i)
            return add(total, part), _plus(d_x, more, i), d_mixed

        total, d_x, d_mixed = inputs.each(in_question, (total, d_x, tuple(d_mixed)))
    part, d_read = pull_mixing(d_mixed)

    def in_front(i: Any, x: Array, carry: tuple[Block, Chunks]) -> tuple[Block, Chunks]:
        total, d_x = carry
        _, pull = jax.vjp(lambda p, x: before(p, x, i), params, x)
        part, more = pull(_take(d_read, i))
        return add(total, part), _plus(d_x, more, i)

    total, d_x = inputs.each(in_front, (add(total, part), d_x))
    if rest.encoder is not None and d_memory is not None:
        whole = _each(inputs, lambda i, x: x, jax.eval_shape(lambda: d_x[0]))
        made, pull = jax.vjp(lambda p, x: encode_stretch(combine(p, rest), x, sequence), params, whole)
        part, more = pull(jax.tree.map(lambda d, like: d.astype(like.dtype), d_memory, made))
        total, d_x = add(total, part), d_x + more
    return total, d_x, d_memory


def encode_stretch(block: Block, x: Chunks, sequence: Stretch) -> LandmarkPages:
    """The pages that end in this device's stretch, of about a chunk's tokens at a time."""
    encoder = block.encoder
    assert encoder is not None
    size = encoder.hsa.chunk_size
    with as_stretches():
        cut, _ = cut_pages(_joined(x), size)

    def some(x: Array) -> tuple[Array, ...]:
        made = encoder.encode(x)
        return tuple(jnp.swapaxes(y, 1, 2) for y in (made.k, made.v, made.landmarks))

    made = by_blocks(some, max(1, sequence.chunk_size // size), (cut,))
    return LandmarkPages(*(jnp.swapaxes(y, 1, 2) for y in made))


def ask(block: Block, x: Float[Array, "B C E"], mixed: Any) -> Any:
    """Queries of a chunk for the pages of a memory."""
    if isinstance(block.mixer, RecurrentMixer):
        return block.page_queries(x, *mixed)
    return block.page_queries(x, block.attended(x, *mixed))


def read_pages(block: Block, asked: Any, memory: LandmarkPages, sequence: Stretch) -> Float[Array, "N B C H D"]:
    """What the queries of this device's chunks read, in the pages of all devices; in the dtype of queries."""
    reader, hsa = block.reader, block.hsa
    assert reader is not None
    assert hsa is not None
    q, retrieval = map(_joined, asked)
    with as_stretches():
        visible = pages_over_devices(sequence.segments, q.shape[:2], hsa.chunk_size)
        heads = reader.read(q, retrieval, ReadablePages(memory, visible, hsa.top_k, over_devices=True))
    return _cut(heads.astype(q.dtype), sequence)


def before_mixing(block: Block, x: Float[Array, "B C E"], sequence: Stretch, i: Any) -> Any:
    """What the mixers read of chunk i, token by token: queries, keys and values, or the mixer's input, or all four."""
    read: tuple[Array, ...] = ()
    if not isinstance(block.mixer, RecurrentMixer):
        read = block.project(x, sequence.context(i))
    return read if read and block.beside is None else (*read, block.mixer_input(x))


def mix(block: Block, read: Any, sequence: Stretch, known: Partial | None = None) -> Any:
    """What the mixers make of a stretch, from what they read of its chunks: the heads' outputs, what a recurrent mixer
    gives, or both. known: what `find` gave."""
    found: list[Any] = []
    attended: list[Any] = [_joined(x) for x in read]
    context = sequence.all_chunks()
    beside = None if len(attended) == 3 else attended.pop()
    with as_stretches():
        if attended:
            whole = None if known is None else Partial(*map(_joined, known))
            config, arguments = block.attention.config, _attention_arguments(block, sequence)
            heads = context_attention(*attended, **arguments, known=whole, local=sequence_attention)
            # Without a gate, what is behind rounds it as its first step.
            gated = getattr(config, "output_gate", False)
            found.append(heads if gated else heads.astype(attended[0].dtype))
        if beside is not None:
            recurrent = block.mixer if block.beside is None else block.beside
            assert isinstance(recurrent, RecurrentMixer)
            found.append(recurrent.parallel(beside, context))
    return tuple(_cut(x, sequence) for x in found)


def find(block: Block, read: Any, sequence: Stretch) -> Partial | None:
    """What attention finds of a stretch, all chunks apart; None where it does not go over all devices."""
    if isinstance(block.mixer, RecurrentMixer):
        return None
    with as_stretches():
        q, k, v = map(_joined, read[:3])
        found = found_attention(q, k, v, **_attention_arguments(block, sequence))
    return None if found is None else Partial(*(_cut(x, sequence) for x in found))


def _attention_arguments(block: Block, sequence: Stretch) -> dict[str, Any]:
    config, context = block.attention.config, sequence.all_chunks()
    return {
        "pattern": config.pattern,
        "scale": config.softmax_scale,
        "segment_ids": context.segment_ids,
        "softcap": config.softcap,
        "slopes": block.attention.slopes(),
        "sink_logits": block.attention.learned_sinks(),
        "exchange": context.exchange,
    }


def after_mixing(block: Block, x: Float[Array, "B C E"], mixed: Any) -> Float[Array, "B C E"]:
    """The layer's output for a chunk. Behind what the mixers give, `mixed` has what a layer with a reader has read."""
    first, *beside = mixed
    pages = None if block.reader is None else beside.pop()
    if isinstance(block.mixer, RecurrentMixer):
        return block.join(x, first, pages)
    return block.combine(x, first, pages, *beside)


def _each(inputs: ActivationReader, make: Callable[[Any, Array], Tree], shape: Tree) -> Tree:
    """What `make` gives for each chunk, all chunks together; it is of this shape for one."""
    empty = jax.tree.map(lambda one: jnp.zeros((inputs.count, *one.shape), one.dtype), shape)
    return inputs.each(lambda i, x, made: _put(made, make(i, x), i), empty)


def _plus(total: Chunks, x: Array, i: Any) -> Chunks:
    """`total` with `x` added to chunk i."""
    return jax.lax.dynamic_update_index_in_dim(total, chunk_at(total, i) + x, i, 0)


def _joined(x: Float[Array, "N B C ..."]) -> Float[Array, "B NC ..."]:
    return rearrange(x, "n b c ... -> b (n c) ...")


def _cut(x: Float[Array, "B NC ..."], sequence: Stretch) -> Float[Array, "N B C ..."]:
    return rearrange(x, "b (n c) ... -> n b c ...", n=sequence.count)


def _take(tree: Tree, i: Any) -> Tree:
    return jax.tree.map(lambda x: chunk_at(x, i), tree)


def _put(tree: Tree, part: Tree, i: Any) -> Tree:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), tree, part)
