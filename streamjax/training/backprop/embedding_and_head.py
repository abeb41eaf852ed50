"""The model's two ends in chunked backprop: hidden states to loss, and tokens to embeddings, a stretch at a time.

Logits of a whole sequence are B x T x V values, more than everything else in a training step when V is large. Here
they exist for `logits_chunk` tokens of a row, once: the pass that makes them takes the loss and its gradient of them.
Or nowhere, where there are kernels for that (`token_kernels.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.attention.block_cutting import cut_blocks, even_size, join_blocks
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import with_layers, without_layers
from streamjax.parallel.rules import axes_of, free_spec
from streamjax.training.backprop import loss_kernels
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.gradient_reduction import Reduction, keep_like
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, add, chunk_at, zeros_like
from streamjax.training.backprop.storage.layer_stack import LayerStack
from streamjax.training.backprop.trainable_parameters import Trainable, combine, partition
from streamjax.training.objectives.objective import Batch, Linear, Objective, TokenStats, token_stats

_INPUTS = {"embedding", "embedding_norm", "layer_inputs"}  # what is between tokens and what the first layer reads
LOGITS_PER_CHUNK = 1 << 26  # float32 logits that may exist at once: 256 MiB


def default_logits_chunk(model: Decoder, batch_size: int) -> int:
    """Tokens of a row whose logits may exist at once."""
    return max(1, LOGITS_PER_CHUNK // (batch_size * model.config.vocab_size))


def output_partition(ends: Decoder, trainable: Trainable) -> tuple[Decoder, Decoder]:
    """Parameters between the last hidden state and the logits that are trained, and all others."""
    names = {"norm", "head_bias", "embedding" if ends.head is None else "head"}
    return partition(ends, trainable, names)


def stats_of(
    ends: Decoder, hidden: Float[Array, "B C E"], targets: Int32[Array, "B C ..."], logits_chunk: int
) -> TokenStats:
    """Statistics of the tokens of a chunk whose hidden states, before the last norm, are given."""
    if loss_kernels.applicable(ends, hidden, targets):
        return loss_kernels.token_stats(ends, ends.norm(hidden), targets)
    length = hidden.shape[1]
    size = even_size(length, logits_chunk)
    if size == length:
        return token_stats(ends.logits(ends.norm(hidden)), targets)

    def one(piece: tuple[Array, Array]) -> TokenStats:
        return token_stats(ends.logits(ends.norm(piece[0])), piece[1])

    cut = jax.lax.map(one, (cut_blocks(hidden, size), cut_blocks(targets, size)))
    return TokenStats(*(join_blocks(x, length) for x in cut))


def loss_and_vjp(
    ends: Decoder,
    options: GradientOptions,
    hidden: Float[Array, "B C E"],
    prepared: Batch,
    objective: Objective,
    grads: Decoder,
) -> tuple[Float[Array, ""], Decoder, Float[Array, "B C E"]]:
    """Loss of a chunk, `grads` with the gradient of the output parameters added, and the cotangent of `hidden`.

    Args:
      ends: the model without its layers.
      options: of the gradient.
      hidden: output of the last layer, before the last norm.
      prepared: the objective's arrays for this chunk.
      objective: separable.
      grads: as the first part of `output_partition`.
    """
    if loss_kernels.applicable(ends, hidden, prepared["targets"]):
        return _by_kernels(ends, options, hidden, prepared, objective, grads)
    params, rest = output_partition(ends, options.trainable)
    length = hidden.shape[1]
    size = even_size(length, options.logits_chunk)

    def part(params: Decoder, hidden: Array, prepared: Batch) -> Array:
        model = combine(params, rest)
        return objective.loss(token_stats(model.logits(model.norm(hidden)), prepared["targets"]), prepared)

    def one(sums: tuple[Array, Any], piece: tuple[Array, Batch]) -> tuple[tuple[Array, Any], Array]:
        loss, grads = sums
        more, (d_params, d_hidden) = jax.value_and_grad(part, argnums=(0, 1))(params, *piece)
        return (loss + more, add(grads, d_params)), d_hidden

    start = jnp.zeros((), accumulator(hidden.dtype)), grads
    if size == length:
        (loss, grads), d_hidden = one(start, (hidden, prepared))
        return loss, grads, d_hidden
    cut = cut_blocks(hidden, size), {name: cut_blocks(x, size) for name, x in prepared.items()}
    (loss, grads), d_hidden = jax.lax.scan(one, start, cut)
    return loss, grads, join_blocks(d_hidden, length)


def _by_kernels(
    ends: Decoder, options: GradientOptions, hidden: Array, prepared: Batch, objective: Objective, grads: Decoder
) -> tuple[Float[Array, ""], Decoder, Float[Array, "B C E"]]:
    """`loss_and_vjp` where kernels compute what the objective reads, and its gradient, without logits."""
    params, rest = partition(ends, options.trainable, {"norm"})
    normed, pull = jax.vjp(lambda params, x: combine(params, rest).norm(x), params, hidden)
    of_norm, of_matrix = partition(grads, nnx.Variable, {"norm"})
    known = jax.tree.leaves(of_matrix)  # one array, or none where it is not trained
    loss, d_normed, d_matrix = loss_kernels.loss_and_gradients(
        ends, normed, prepared, objective, known[0] if known else None
    )
    d_norm, d_hidden = pull(d_normed.astype(normed.dtype))
    return loss, combine(add(of_norm, d_norm), jax.tree.map(lambda _: d_matrix, of_matrix)), d_hidden


def output_zeros(ends: Decoder, options: GradientOptions) -> Decoder:
    """Zeros to which `loss_and_vjp` adds gradients."""
    return zeros_like(output_partition(ends, options.trainable)[0], options.grad_dtype)


def embed_zeros(ends: Decoder, options: GradientOptions) -> Decoder:
    """Zeros to which `embed_vjp` adds gradients."""
    return zeros_like(partition(ends, options.trainable, _INPUTS)[0], options.grad_dtype)


def embed_vjp(
    ends: Decoder, options: GradientOptions, tokens: Int32[Array, "B C"], d_x: Float[Array, "B C E"], grads: Decoder
) -> Decoder:
    """`grads` with the gradient of the embedding from some tokens added."""
    params, rest = partition(ends, options.trainable, _INPUTS)
    _, pull = jax.vjp(lambda p: combine(p, rest).embed(tokens), params)
    return add(grads, pull(d_x)[0])


def output_backward(
    ends: Decoder, options: GradientOptions, x: Float[Array, "N B C E"], sequence: ChunkedSequence, objective: Objective
) -> tuple[Float[Array, ""], Decoder, Float[Array, "N B C E"]]:
    """Loss, gradient of the output parameters, and the cotangent of the last layer's output in its place."""
    stats = None
    if not objective.separable:
        targets, size = sequence.prepared["targets"], options.logits_chunk
        stats = jax.lax.map(
            lambda i: stats_of(ends, chunk_at(x, i), chunk_at(targets, i), size), jnp.arange(sequence.count)
        )
    loss, linear, sequence = objective_of_chunks(objective, sequence, stats)

    def chunk(i: Any, carry: tuple[Array, Decoder, Array]) -> tuple[Array, Decoder, Array]:
        total, grads, x = carry
        prepared = {name: chunk_at(value, i) for name, value in sequence.prepared.items()}
        more, grads, d_x = loss_and_vjp(ends, options, chunk_at(x, i), prepared, linear, grads)
        return total + more, grads, jax.lax.dynamic_update_index_in_dim(x, d_x, i, 0)

    start = jnp.zeros((), accumulator(x.dtype)), output_zeros(ends, options), x
    total, grads, d_x = jax.lax.fori_loop(0, sequence.count, chunk, start)
    return total if loss is None else loss, grads, d_x


def objective_of_chunks(
    objective: Objective, sequence: ChunkedSequence, stats: TokenStats | None
) -> tuple[Array | None, Objective, ChunkedSequence]:
    """A separable objective with the gradient of `objective`, and the arrays that it reads.

    One that is separable is returned as it is, with None for its loss. Another needs the `stats` of all tokens, [N, B,
    C]: with them its loss is known, and its gradient is a linear function of the statistics.
    """
    if stats is None:
        return None, objective, sequence
    whole = TokenStats(*(rearrange(x, "n b c -> b (n c)")[:, : sequence.length] for x in stats))
    loss, slopes = jax.value_and_grad(objective.loss)(whole, sequence.whole)
    prepared = Linear.prepared(sequence.whole["targets"], slopes)
    return loss, Linear(), sequence.with_prepared(prepared)


def embed_backward(
    ends: Decoder, options: GradientOptions, d_output: Decoder, d_x: Float[Array, "N B C E"], sequence: ChunkedSequence
) -> Decoder:
    """Gradient of the trained parameters of the two ends, in their dtypes: `d_output` and the embedding's."""

    def chunk(i: Any, grads: Decoder) -> Decoder:
        return embed_vjp(ends, options, chunk_at(sequence.tokens, i), chunk_at(d_x, i), grads)

    grads = jax.lax.fori_loop(0, sequence.count, chunk, embed_zeros(ends, options))
    return sum_of_ends(ends, options, d_output, grads)


def sum_of_ends(ends: Decoder, options: GradientOptions, d_output: Decoder, d_embedding: Decoder) -> Decoder:
    """Both ends' gradients as one tree, in the dtypes of the parameters; None for what is not trained."""
    trained, _ = partition(ends, options.trainable)
    is_leaf = lambda node: node is None or isinstance(node, nnx.Variable)  # noqa: E731

    def total(param: Any, *parts: Any) -> Any:
        found = [part for part in parts if part is not None]
        return None if param is None else jax.tree.map(lambda p, *xs: sum(xs[1:], xs[0]).astype(p.dtype), param, *found)

    return jax.tree.map(total, trained, d_output, d_embedding, is_leaf=is_leaf)


def whole_ends(model: Decoder, split: Decoder | None, reduction: Reduction) -> Decoder:
    """The model without its layers, its parameters whole on each device."""
    ends = without_layers(model)
    return ends if split is None else reduction.gather(ends, without_layers(split))


def finish_ends(grads: Decoder, split: Decoder | None, reduction: Reduction) -> Decoder:
    """The ends' gradients summed over all devices and split as the parameters are."""
    return grads if split is None else reduction.reduce(grads, keep_like(without_layers(split), grads))


def assemble(d_ends: Decoder, d_layers: list[tuple[LayerStack, list]]) -> Decoder:
    """The gradient as a tree of the model's shape."""
    stack = [grads for rows, grads in d_layers if rows.stacked]
    single = [grads for rows, grads in d_layers if not rows.stacked]
    return with_layers(d_ends, stack[0] if stack else [], single[0] if single else [])


def whole_sequence_stats(
    model: Decoder, hidden: Float[Array, "B T E"], targets: Int32[Array, "B T ..."], logits_chunk: int
) -> TokenStats:
    """Statistics of all tokens from hidden states behind the last norm, differentiable by `jax.grad`.

    Logits are made for `logits_chunk` tokens at a time and made again in the backward pass. On a mesh each device does
    so with its own tokens: the output matrix is gathered once, and its gradient is reduced once.
    """
    mesh, names = jax.sharding.get_abstract_mesh(), ("batch", "length")
    split = PartitionSpec() if mesh.empty else free_spec(names, targets.shape[:2], mesh)
    if axes := {axis for entry in split for axis in axes_of(entry)}:
        own = jax.shard_map(
            lambda ends, hidden, targets: whole_sequence_stats(ends, hidden, targets, logits_chunk),
            mesh=mesh,
            axis_names=axes,
            in_specs=(PartitionSpec(), split, split),
            out_specs=split,
            check_vma=False,
        )
        return own(without_layers(model), hidden, targets)
    if loss_kernels.applicable(model, hidden, targets):
        return loss_kernels.token_stats(model, hidden, targets)
    length = hidden.shape[1]
    size = even_size(length, logits_chunk)

    def one(hidden: Array, targets: Array) -> TokenStats:
        return token_stats(model.logits(hidden), targets)

    if size == length:
        return one(hidden, targets)
    _, cut = jax.lax.scan(
        lambda carry, piece: (carry, jax.checkpoint(one)(*piece)),
        None,
        (cut_blocks(hidden, size), cut_blocks(targets, size)),
    )
    return TokenStats(*(join_blocks(x, length) for x in cut))
