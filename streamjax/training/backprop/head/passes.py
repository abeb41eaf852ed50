"""The head forwards, and forwards and backwards at once, over the blocks of tokens that count.

Logits exist for one block, or nowhere, where there are kernels for that (`loss_kernels.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import accumulator
from streamjax.models.decoder import Decoder
from streamjax.training.backprop import loss_kernels
from streamjax.training.backprop.head.counted_tokens import TokenBlocks
from streamjax.training.backprop.sequence_chunks import add
from streamjax.training.backprop.trainable_parameters import combine, partition
from streamjax.training.objectives.objective import Batch, Objective, TokenStats, token_stats

KERNEL_BLOCK = 2048  # tokens at most that a call of a kernel takes: in each it reads the matrix for as many at a time


def head_stats(
    ends: Decoder,
    hidden: Float[Array, "N B C E"],
    targets: Int32[Array, "N B C ..."],
    counted: Bool[Array, "N B C"] | None,
    logits_chunk: int,
    *,
    normed: bool = False,
) -> TokenStats:
    """Statistics [N, B, C] of the tokens that count, and zeros for all others.

    Args:
      ends: the model without its layers.
      hidden: outputs of the last layer; behind the last norm if `normed`.
      targets: of each token one, or several.
      counted: which tokens count; all where None.
      logits_chunk: tokens of a row whose logits exist at once.
      normed: whether the last norm is done.
    """
    kernels, blocks = _blocks(ends, hidden, targets, counted, logits_chunk)
    flat_hidden, flat_targets = blocks.flat(hidden), blocks.flat(targets)

    def one(hidden: Array, targets: Array) -> TokenStats:
        hidden = hidden if normed else ends.norm(hidden)
        if kernels:
            return loss_kernels.token_stats(ends, hidden, targets)
        return token_stats(ends.logits(hidden), targets)

    def block(i: Any, stats: TokenStats) -> TokenStats:
        new = one(blocks.take(flat_hidden, i), blocks.take(flat_targets, i))
        return TokenStats(*(blocks.put(x, i, y) for x, y in zip(stats, new, strict=True)))

    dtype, shape = accumulator(hidden.dtype), hidden.shape[:3]
    shapes = targets.shape, shape, shape
    found = blocks.loop(block, TokenStats(*(blocks.flat(jnp.zeros(shape, dtype)) for shape in shapes)))
    return TokenStats(*(x.reshape(shape) for x, shape in zip(found, shapes, strict=True)))


def head_gradients(
    params: Decoder,
    rest: Decoder,
    hidden: Float[Array, "N B C E"],
    prepared: Batch,
    objective: Objective,
    counted: Bool[Array, "N B C"] | None,
    logits_chunk: int,
    grads: Decoder,
    *,
    normed: bool = False,
) -> tuple[Float[Array, ""], Decoder, Float[Array, "N B C E"]]:
    """Loss, `grads` with the gradient of `params` added, and the cotangent of `hidden`, 0 for tokens that do not count.

    Args:
      params, rest: of the model without its layers, the parameters of the head that are trained, and all others.
      hidden, counted, logits_chunk, normed: as for `head_stats`.
      prepared: the objective's arrays, [N, B, C, ...].
      objective: separable.
      grads: a tree as `params`, of any float dtype.
    """
    ends = combine(params, rest)
    kernels, blocks = _blocks(ends, hidden, prepared["targets"], counted, logits_chunk)
    step, flat = _by_kernels if kernels else _by_logits, {name: blocks.flat(x) for name, x in prepared.items()}

    def block(i: Any, carry: tuple[Array, Decoder, Array]) -> tuple[Array, Decoder, Array]:
        loss, grads, x = carry
        own = {name: blocks.take(value, i) for name, value in flat.items()}
        more, grads, d_x = step(params, rest, blocks.take(x, i), own, objective, grads, normed)
        return loss + more, grads, blocks.put(x, i, d_x)

    x = hidden if counted is None else jnp.where(counted[..., None], hidden, 0)  # for where no cotangent is put
    start = jnp.zeros((), accumulator(hidden.dtype)), grads, blocks.flat(x)
    loss, grads, d_hidden = blocks.loop(block, start)
    return loss, grads, d_hidden.reshape(hidden.shape)


def _blocks(
    ends: Decoder, hidden: Array, targets: Array, counted: Array | None, logits_chunk: int
) -> tuple[bool, TokenBlocks]:
    """Whether kernels do it, and the blocks in which it is done."""
    chunks, rows, length, _ = hidden.shape
    kernels = loss_kernels.applicable(ends, hidden[0], targets[0])
    most = min(length, max(1, KERNEL_BLOCK // rows)) if kernels else logits_chunk
    return kernels, TokenBlocks.of(counted, (chunks, rows, length), most)


def _by_logits(
    params: Decoder, rest: Decoder, hidden: Array, prepared: Batch, objective: Objective, grads: Decoder, normed: bool
) -> tuple[Array, Decoder, Array]:
    """A block, whose logits are made once: they give the loss and its gradient."""

    def loss(params: Decoder, hidden: Array) -> Array:
        model = combine(params, rest)
        logits = model.logits(hidden if normed else model.norm(hidden))
        return objective.loss(token_stats(logits, prepared["targets"]), prepared)

    value, (d_params, d_hidden) = jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)
    return value, add(grads, d_params), d_hidden


def _by_kernels(
    params: Decoder, rest: Decoder, hidden: Array, prepared: Batch, objective: Objective, grads: Decoder, normed: bool
) -> tuple[Array, Decoder, Array]:
    """A block, without logits."""
    of_norm, others = partition(params, nnx.Variable, {"norm"})

    def norm(of_norm: Decoder, hidden: Array) -> Array:
        return hidden if normed else combine(combine(of_norm, others), rest).norm(hidden)

    ready, pull = jax.vjp(norm, of_norm, hidden)
    norm_grads, matrix_grads = partition(grads, nnx.Variable, {"norm"})
    known = jax.tree.leaves(matrix_grads)  # one array, or none where it is not trained
    loss, d_ready, d_matrix = loss_kernels.loss_and_gradients(
        combine(params, rest), ready, prepared, objective, known[0] if known else None
    )
    d_norm, d_hidden = pull(d_ready.astype(ready.dtype))
    return loss, combine(add(norm_grads, d_norm), jax.tree.map(lambda _: d_matrix, matrix_grads)), d_hidden
