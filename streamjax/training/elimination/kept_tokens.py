"""A model's hidden states where each layer computes its most informative blocks of tokens alone (LeMo, 2501.09767).

The blocks that a layer's predictor ranks highest are gathered, in order, and go through attention and MLP; the results
take the places of what went in, and all other tokens stay as they are: the residual stream carries them on. How many
blocks that are is fixed for each layer, so every shape is static. No gradient flows through the choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Int32

from streamjax.models.block import Block
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import SequenceContext
from streamjax.models.mixers.handed_on.learned_bounds import with_bounds
from streamjax.training.elimination.informativeness import last_seeing
from streamjax.training.elimination.predictors import Predictor, guessed_scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenElimination:
    """Which tokens the layers of a model compute.

    stack: predictors of stacked layers, one for each layer of a period, with the rows of the stack in front. layers:
    those of single layers. None: the layer computes all tokens. shares: of the blocks that each layer computes. block:
    tokens of a block.
    """

    stack: tuple[Predictor | None, ...]
    layers: tuple[Predictor | None, ...]
    shares: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})

    def counts(self, length: int) -> list[int]:
        """How many blocks of a row each layer computes.

        Raises:
          ValueError: a row that is no whole number of blocks.
        """
        if length % self.block:
            raise ValueError(f"rows of {length} tokens are no whole blocks of {self.block}: change either")
        blocks = length // self.block
        return [max(1, min(blocks, round(share * blocks))) for share in self.shares]


def hidden_of_kept(
    model: Decoder,
    elimination: TokenElimination,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    remat: bool = False,
) -> Float[Array, "B T E"]:
    """`Decoder.hidden` of layers that compute what `elimination` keeps.

    With `remat` only the tokens that a layer computes are kept of its input, and which they are.
    """
    model, (rows, length) = with_bounds(model), tokens.shape
    counts = elimination.counts(length)
    position = jnp.arange(length) if positions is None else positions
    context = SequenceContext(jnp.broadcast_to(position, tokens.shape).astype(jnp.uint32), segment_ids, length)
    last = last_seeing(rows, length, elimination.block, segment_ids)

    def apply(block: Block, predictor: Predictor | None, count: int, x: Array) -> Array:
        if predictor is None or count == length // elimination.block:
            whole = lambda block, x: block.parallel(x, context)[0]  # noqa: E731
            return (jax.checkpoint(whole) if remat else whole)(block, x)
        said = jax.lax.stop_gradient(block.mixer_input(x))
        scores = guessed_scores(predictor, said, elimination.block, last)
        return compute_blocks(block, x, context, highest(scores, count), elimination.block, remat)

    x = model.embed(tokens)
    period, stacked = len(model.stack), model.stacked_layers
    by_row = [tuple(counts[i : i + period]) for i in range(0, stacked, period)] if period else []
    runs = [(key, len(list(run))) for key, run in groupby(by_row)]
    for parts, (row_counts, _) in zip(_cut((tuple(model.stack), elimination.stack), runs), runs, strict=True):

        def row(x: Array, part: tuple, counts: tuple[int, ...] = row_counts) -> tuple[Array, None]:
            for block, predictor, count in zip(*part, counts, strict=True):
                x = apply(block, predictor, count, x)
            return x, None

        x, _ = jax.lax.scan(row, x, parts)
    for block, predictor, count in zip(model.layers, elimination.layers, counts[stacked:], strict=True):
        x = apply(block, predictor, count, x)
    return model.norm(x)


def highest(scores: Float[Array, "B N"], count: int) -> Int32[Array, "B C"]:
    """The blocks with the highest scores, in the order in which they stand; of equal ones the first."""
    return jnp.sort(jax.lax.top_k(scores, count)[1].astype(jnp.int32), axis=1)


def compute_blocks(
    block: Block,
    x: Float[Array, "B T E"],
    context: SequenceContext,
    chosen: Int32[Array, "B C"],
    size: int,
    remat: bool = False,
) -> Float[Array, "B T E"]:
    """A layer's output where it computes the chosen blocks of `size` tokens, and all others pass it by."""

    def gather(x: Array) -> Array:
        cut = rearrange(x, "b (m s) ... -> b m s ...", s=size)
        return rearrange(jax.vmap(lambda row, index: row[index])(cut, chosen), "b m s ... -> b (m s) ...")

    segments = None if context.segment_ids is None else gather(context.segment_ids)
    own = SequenceContext(gather(context.position), segments, context.length)
    layer = lambda block, x: block.parallel(x, own)[0]  # noqa: E731
    y = (jax.checkpoint(layer) if remat else layer)(block, gather(x))

    def put(row: Array, index: Array, new: Array) -> Array:
        return row.at[index].set(new, unique_indices=True, indices_are_sorted=True)

    cut, new = (rearrange(z, "b (m s) e -> b m s e", s=size) for z in (x, y))
    return rearrange(jax.vmap(put)(cut, chosen, new), "b m s e -> b (m s) e")


def _cut(tree: tuple, runs: Sequence[tuple[tuple[int, ...], int]]) -> list[tuple]:
    """Stacked layers in runs of rows of one shape."""
    if len(runs) <= 1:
        return [tree] * len(runs)
    leaves, structure = jax.tree.flatten(tree)
    sizes = [size for _, size in runs]
    pieces = [jax.lax.split(leaf, sizes, axis=0) for leaf in leaves]  # its transpose joins the gradients in one piece
    return [jax.tree.unflatten(structure, piece) for piece in zip(*pieces, strict=True)]
