"""Which heads look far back, without training: echo and induction scores (RazorAttention, Tang et al., 2407.15891).

The model reads random tokens that are repeated, in which nothing but the repetition can be recognised (section 3.1). An
echo head attends to earlier occurrences of the token that it stands at, an induction head to the tokens behind them. A
head's score is the attention that it gives them, its mean over the tokens that have occurred before. The heads with the
largest scores of either kind are protected: they keep their full context.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Int32

from pallas_kernels.partial import add_sink_logits
from pallas_kernels.patterns import Full
from streamjax.attention.dense import attention_shares, summed_over_queries
from streamjax.attention.flash import flash_attention
from streamjax.models.config import AttentionMixerConfig, ModelConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import SequenceContext
from streamjax.training.heads.gates import far_layers

_BLOCK = 128  # queries whose attention to all keys exists at once


class HeadScores(NamedTuple):
    """For each query head of each layer, in [0, 1]; 0 in layers with a window of their own."""

    echo: Float[Array | np.ndarray, "L H"]
    induction: Float[Array | np.ndarray, "L H"]


def repeated_tokens(
    config: ModelConfig, length: int, repeats: int = 4, rows: int = 1, seed: int = 0
) -> Int32[np.ndarray, "B T"]:
    """`length` random tokens, `repeats` times one after another, behind BOS where the model has one.

    The tokens of a row differ from each other if the vocabulary is large enough. BOS and EOS are not drawn.

    Raises:
      ValueError: fewer than 2 tokens, repeats or rows below 2 or 1, or a vocabulary of special tokens only.
    """
    if length < 2 or repeats < 2 or rows < 1:
        raise ValueError(f"2 tokens, 2 repeats and 1 row are the least, got {length}, {repeats} and {rows}")
    special = {config.bos_token_id, *config.eos_token_ids}
    known = np.array([i for i in range(config.vocab_size) if i not in special], np.int32)
    if not known.size:
        raise ValueError("the vocabulary holds special tokens only")
    random = np.random.default_rng(seed)
    drawn = np.stack([random.choice(known, length, replace=length > known.size) for _ in range(rows)])
    start = np.full((rows, int(config.bos_token_id is not None)), config.bos_token_id or 0, np.int32)
    return np.concatenate([start, np.tile(drawn, repeats)], axis=1)


@jax.jit
def head_scores(model: Decoder, tokens: Int[Array, "B T"]) -> HeadScores:
    """Echo and induction scores of every query head.

    Tokens before a query are of the kind "echo" if they are the same token as the query's, of the kind "induction" if
    the token before them is. A query counts for a kind if there is a token of that kind.

    Args:
      model: the model.
      tokens: rows in which tokens are repeated; see `repeated_tokens`.

    Raises:
      ValueError: as `far_layers`.
    """
    config, far = model.config, far_layers(model.config)
    context = SequenceContext.from_start(*tokens.shape)
    x = model.embed(tokens)
    found = []
    for i in range(config.num_layers):
        block = model.layer(i)
        if not far[i]:
            x = block.parallel(x, context)[0]
            found.append(jnp.zeros((2, block.mixer.config.num_heads)))
            continue
        q, k, v = block.project(x, context)
        mixer, slopes = block.attention.config, block.attention.slopes()
        part = flash_attention(q, k, v, Full(), scale=mixer.softmax_scale, softcap=mixer.softcap, slopes=slopes)
        out, lse = add_sink_logits(part, block.attention.learned_sinks())
        found.append(_scores(q, jnp.swapaxes(k, 1, 2), lse, tokens, mixer, slopes))
        x = block.combine(x, out)
    echo, induction = jnp.stack(found, axis=1)
    return HeadScores(echo, induction)


def _scores(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B K T D"],
    lse: Float[Array, "B T H"],
    tokens: Int[Array, "B T"],
    config: AttentionMixerConfig,
    slopes: Float[Array, " H"] | None,
) -> Float[Array, "2 H"]:
    """Echo and induction scores of one layer's heads, some queries at a time."""
    length = tokens.shape[1]
    size = min(_BLOCK, length)
    keys = jnp.arange(length)
    before = jnp.concatenate([jnp.full_like(tokens[:, :1], -1), tokens[:, :-1]], axis=1)  # the token before each key

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))

    padded = pad(q), pad(lse), pad(tokens)

    def add(sums: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], None]:
        mine, whole, token = (jax.lax.dynamic_slice_in_dim(x, first, size, 1) for x in padded)
        index = first + jnp.arange(size)
        past = (keys < index[:, None]) & (index < length)[:, None]
        mass, count = [], []
        for other in (tokens, before):
            chosen = past & (token[:, :, None] == other[:, None, :])
            distance = (index[:, None] - keys).astype(jnp.float32)[None, None]
            shares = attention_shares(
                mine, k, whole, chosen[:, None],
                scale=config.softmax_scale, softcap=config.softcap, slopes=slopes, distance=distance,
            )  # fmt: skip
            mass.append(jnp.sum(summed_over_queries(shares), axis=(0, 2)))
            count.append(jnp.sum(jnp.any(chosen, axis=2), dtype=jnp.int32))
        return (sums[0] + jnp.stack(mass), sums[1] + jnp.stack(count)), None

    zeros = jnp.zeros((2, config.num_heads), lse.dtype), jnp.zeros(2, jnp.int32)
    (mass, count), _ = jax.lax.scan(add, zeros, jnp.arange(0, length, size))
    return mass / jnp.maximum(count, 1)[:, None]


def protected_heads(
    scores: HeadScores, config: ModelConfig, echo: float = 0.01, induction: float = 0.14
) -> tuple[Float[np.ndarray, "L K"], Bool[np.ndarray, "L K"]]:
    """Gates of the key heads, and which of them are protected.

    A query head is protected if its score is among the largest; a key head, if one of its query heads is. The gate of a
    query head is half its better score, and half a unit more if it is protected; a key head has the largest gate of its
    query heads. Protected heads thus have the largest gates, 0.5 and more, and a cache may keep more or fewer of them.

    Args:
      scores: of all query heads.
      config: the model's.
      echo, induction: shares of the query heads of layers without windows whose scores count as large; with a share
        above 0, one head at least.

    Raises:
      ValueError: a share outside [0, 1]; as `far_layers`.
    """
    if not (0 <= echo <= 1 and 0 <= induction <= 1):
        raise ValueError(f"the shares of echo and induction heads must be in [0, 1], got {echo} and {induction}")
    far = np.repeat(far_layers(config)[:, None], config.blocks[0].mixer.num_heads, axis=1)
    chosen = np.zeros_like(far)
    for share, score in ((echo, scores.echo), (induction, scores.induction)):
        count = max(round(share * int(far.sum())), int(share > 0))
        ranked = np.argsort(np.where(far, -np.asarray(score), np.inf), axis=None, kind="stable")
        chosen.flat[ranked[:count]] = True
    best = np.clip(np.maximum(np.asarray(scores.echo, np.float64), np.asarray(scores.induction)), 0.0, 0.999)
    gates = np.where(far, (chosen + best) / 2.0, 0.0)

    def of_group(x: np.ndarray) -> np.ndarray:
        return rearrange(x, "l (k g) -> l k g", k=config.blocks[0].attention.num_kv_heads).max(axis=2)

    return of_group(gates), of_group(chosen)
