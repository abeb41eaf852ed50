"""The model's two ends in chunked backprop: hidden states to loss, and tokens to embeddings, a stretch at a time.

Logits of a whole sequence are B x T x V values, more than everything else in a training step when V is large. Here
they exist for `logits_chunk` tokens of a row, once: the pass that makes them takes the loss and its gradient of them
(`head/passes.py`). They are made of tokens that count, and of no others.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import with_layers, without_layers
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.gradient_reduction import Reduction, keep_like
from streamjax.training.backprop.head.passes import head_gradients, head_stats
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, add, chunk_at, zeros_like
from streamjax.training.backprop.storage.layer_stack import LayerStack
from streamjax.training.backprop.trainable_parameters import Trainable, combine, partition
from streamjax.training.objectives.objective import Batch, Linear, Objective, TokenStats

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
    ends: Decoder,
    hidden: Float[Array, "B C E"],
    targets: Int32[Array, "B C ..."],
    counted: Bool[Array, "B C"] | None,
    logits_chunk: int,
) -> TokenStats:
    """Statistics of a chunk's tokens that count, zeros for others; `hidden` is before the last norm."""
    stats = head_stats(ends, hidden[None], targets[None], None if counted is None else counted[None], logits_chunk)
    return TokenStats(*(x[0] for x in stats))


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
    chunk, counted = {name: x[None] for name, x in prepared.items()}, objective.counted(prepared)
    loss, grads, d_hidden = head_gradients(
        *output_partition(ends, options.trainable),
        hidden[None],
        chunk,
        objective,
        None if counted is None else counted[None],
        options.logits_chunk,
        grads,
    )
    return loss, grads, d_hidden[0]


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
    stats, size = None, options.logits_chunk
    if not objective.separable:
        stats = head_stats(ends, x, sequence.prepared["targets"], sequence.counted(objective), size)
    loss, linear, sequence = objective_of_chunks(objective, sequence, stats)
    params, rest = output_partition(ends, options.trainable)
    start = output_zeros(ends, options)
    total, grads, d_x = head_gradients(
        params, rest, x, sequence.prepared, linear, sequence.counted(linear), size, start
    )
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
    whole = TokenStats(*map(sequence.joined, stats))
    loss, slopes = jax.value_and_grad(objective.loss)(whole, sequence.whole)
    prepared = Linear.prepared(sequence.whole["targets"], slopes)
    return sequence.once(loss), Linear(), sequence.with_prepared(prepared)


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
