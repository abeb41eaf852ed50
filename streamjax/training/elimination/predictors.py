"""Networks that guess the informativeness of blocks from a layer's input (Jenga, section 4.3, equation 3).

A layer has two, one for queries and one for keys: three matrices with ReLU between them, applied to each token, whose
results a block takes the mean of. The score of a pair of blocks is the product of what they say of the two.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Float, Int32

Network = tuple[Float[Array, "*R E W"], Float[Array, "*R W W"], Float[Array, "*R W C"]]


class Predictor(NamedTuple):
    """The networks of one layer, or of a stack of layers."""

    queries: Network
    keys: Network


def draw_predictor(draw: np.random.Generator, d_model: int, width: int, channels: int) -> Predictor:
    """A predictor before its training."""

    def network() -> Network:
        shapes = (d_model, width), (width, width), (width, channels)
        first, second, last = (
            jnp.asarray(draw.normal(size=shape) * np.sqrt(2 / shape[0]), jnp.float32) for shape in shapes
        )
        return first, second, last

    return Predictor(network(), network())


def of_blocks(network: Network, x: Float[Array, "B T E"], block: int) -> Float[Array, "B M C"]:
    """What a network says of blocks of tokens, float32; `x` is what the layer's mixer reads."""
    for matrix in network[:-1]:
        x = jax.nn.relu(jnp.einsum("bti,io->bto", x, matrix.astype(x.dtype)))
    mean = reduce(x.astype(jnp.float32), "b (m s) w -> b m w", "mean", s=block)  # the last matrix is linear
    return jnp.einsum("bmw,wc->bmc", mean, network[-1])


def guessed_pairs(predictor: Predictor, x: Float[Array, "B T E"], block: int) -> Float[Array, "B M N"]:
    """Guesses of `pair_scores`."""
    queries, keys = (of_blocks(network, x, block) for network in predictor)
    return jnp.einsum("bmc,bnc->bmn", queries, keys)


def guessed_scores(
    predictor: Predictor, x: Float[Array, "B T E"], block: int, last: Int32[Array, "B N"]
) -> Float[Array, "B N"]:
    """Guesses of `block_scores`: the mean of `guessed_pairs` from each block up to its `last`, without the pairs.

    The product is linear, so the mean over blocks of queries is taken of what is said of them.
    """
    queries, keys = (of_blocks(network, x, block) for network in predictor)
    sums = jnp.pad(jnp.cumsum(queries, axis=1), ((0, 0), (1, 0), (0, 0)))
    first = jnp.arange(keys.shape[1])
    total = jnp.take_along_axis(sums, last[..., None] + 1, axis=1) - sums[:, :-1]
    return jnp.einsum("bnc,bnc->bn", total, keys) / (last - first + 1)
