"""`measure_codebooks`: what channels of keys and values go together, on a text (CQ, Zhang et al., 2405.03917)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from streamjax.kv.codecs.integers import Bits
from streamjax.kv.codecs.measured.codebook_file import LayerCodebooks
from streamjax.kv.codecs.measured.coupled import CQ, Codebooks
from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import SequenceContext
from streamjax.streaming.compacting.attention_layers import measure_layers
from streamjax.streaming.compacting.key_gradients import key_gradients, unrotated
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.token_rows import Rows, as_rows


def measure_codebooks(
    model: Decoder,
    text: Rows,
    coupled: int = 4,
    bits: Bits = 8,
    rounds: int = 25,
    seed: int = 0,
    by_gradients: bool = False,
) -> LayerCodebooks:
    """Of every layer and head, codebooks for runs of `coupled` channels: of keys before rotation, and of values.

    k-means from a start by k-means++: 2^bits entries that leave the smallest squared error on the text. With
    `by_gradients` a token weighs, in each run, the sum of the squares of the loss's gradients there (Fisher), as in the
    paper, which reads 16 texts of 2,048 tokens; the model is then read backwards too.

    Args:
      model: whose keys and values are read.
      text: ids, rows of one length; each is read by itself, from position 0.
      coupled: channels that share a code. Of 4 with 8 bits each takes 2 bits.
      bits: of a code.
      rounds: of k-means.
      seed: of the start.
      by_gradients: whether tokens weigh what the loss minds.

    Raises:
      ValueError: rows that are not as described or fewer tokens than entries, channels that do not divide a head, or a
        layer that is no attention with heads of its own; by gradients also one with another mixer beside it, or a
        memory.

    Example:
      >>> sj.measure_codebooks(model, prompt, coupled=2, bits=2, rounds=2).save("books.safetensors")
      >>> cache = sj.kv.preset("cq", codebooks="books.safetensors")  # --cache=cq:codebooks=FILE
    """
    codec, own = CQ(coupled, bits), fingerprint_in_any_dtype(model)
    if rounds < 1:
        raise ValueError(f"measure_codebooks: rounds is {rounds}: it must be a whole number of at least 1")
    read: list[tuple[Array, Array]] = []

    def measure(block: Block, mixer: AttentionConfig, x: Float[Array, "B T E"], context: SequenceContext) -> int:
        if x.shape[0] * x.shape[1] < 2**bits:
            raise ValueError(f"{x.shape[0] * x.shape[1]} tokens fill no codebooks of {2**bits} entries: give more text")
        codec.check(mixer.head_dim)
        read.append(_keys_and_values(block, x, context))
        return len(read) - 1

    layers, tokens = measure_layers(model, text, measure, needs="codebooks need", lacks="keys could be coded")
    minds = None
    if by_gradients:
        if model.config.hsa is not None or any(block.beside is not None for block in model.config.blocks):
            raise ValueError("measure_codebooks: by_gradients reads layers of attention alone: leave it out")
        minds = key_gradients(model, jnp.asarray(as_rows(text)[0], jnp.int32))

    def fit(layer: int, index: int) -> Codebooks:
        books = []
        for role in range(2):
            runs = _runs(read[index][role], coupled)
            weights = jnp.ones(runs.shape[:2]) if minds is None else (_runs(minds[layer][role], coupled) ** 2).sum(-1)
            found = rearrange(fitted(runs, 2**bits, rounds, seed, weights), "p e c -> (p e) c")
            books.append(np.ascontiguousarray(found, np.float32).tobytes())
        return Codebooks(books[0], books[1], coupled, own)

    made = [layer if isinstance(layer, tuple) else fit(i, layer) for i, layer in enumerate(layers)]
    return LayerCodebooks(tuple(made), own, tokens)


@jax.jit
def _keys_and_values(
    block: Block, x: Float[Array, "B T E"], context: SequenceContext
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    k, v = block.keys(x, context)
    return unrotated(block, k, context), v


def _runs(x: Float[Array, "B T K D"], coupled: int) -> Float[Array, "P N c"]:
    """Runs of channels of all heads, each with its tokens."""
    return rearrange(x.astype(jnp.float32), "b t k (p c) -> (k p) (b t) c", c=coupled)


def fitted(
    x: Float[Array, "P N c"], entries: int, rounds: int, seed: int, weights: Float[Array, "P N"]
) -> Float[np.ndarray, "P E c"]:
    """Codebooks of P runs of channels, each by itself, of points that weigh so much."""
    return np.asarray(_k_means(x, weights, jax.random.split(jax.random.key(seed), len(x)), entries, rounds))


@partial(jax.jit, static_argnames=("entries", "rounds"))
def _k_means(
    x: Float[Array, "P N c"], weights: Float[Array, "P N"], keys: Array, entries: int, rounds: int
) -> Float[Array, "P E c"]:
    return jax.lax.map(lambda run: _one_k_means(run[0], run[1], run[2], entries, rounds), (x, weights, keys))


def _one_k_means(
    x: Float[Array, "N c"], weights: Float[Array, " N"], key: Array, entries: int, rounds: int
) -> Float[Array, "E c"]:
    squares, drawn = jnp.sum(x * x, axis=1), jax.random.uniform(key, (entries,))
    points = jnp.concatenate((x, jnp.ones((len(x), 1))), axis=1)
    weights = weights / jnp.max(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny)) + 1e-9  # none without any

    def spread(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        """k-means++: the next entry is a point, drawn by its weight and its squared distance to the nearest entry."""
        found, distance = carry
        total = jnp.cumsum(distance * weights)
        new = x[jnp.searchsorted(total, total[-1] * drawn[i], side="right").clip(0, len(x) - 1)]
        closer = squares - 2 * x @ new + new @ new
        return found.at[i].set(new), jnp.clip(jnp.minimum(distance, closer), 1e-30)

    first = jnp.zeros((entries, x.shape[1]), x.dtype), jnp.ones(len(x))
    start, _ = jax.lax.fori_loop(0, entries, spread, first)

    def improved(_: Array, books: Array) -> Array:
        # Entries come first, and whose a point is is a product: a CPU has no fast argmin along a row.
        distance = jnp.sum(books * books, axis=1)[:, None] - 2 * books @ x.T
        nearest = jnp.where(distance <= jnp.min(distance, axis=0), weights, 0.0)
        sums = nearest @ points
        count = sums[:, -1:]
        return jnp.where(count > 0, sums[:, :-1] / jnp.where(count > 0, count, 1), books)

    return jax.lax.fori_loop(0, rounds, improved, start)
