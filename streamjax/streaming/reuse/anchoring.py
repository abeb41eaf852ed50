"""`AnchorPool`: a chunk goes behind a text that it was not read behind, by what that text did to chunks like it.

KVCOMM (Ye et al., 2510.12872): a text in front changes a chunk's keys and values, and those of chunks that are alike in
much the same way. A few chunks are therefore read behind it, and what that changed is kept with them: anchors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from streamjax.attention.rotary import Rotary
from streamjax.field_checks import Fraction, Positive, Size, check_arguments
from streamjax.models.config import LatentAttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.models.rope import make_rotary
from streamjax.streaming.reuse.joining import EncodedChunk
from streamjax.streaming.reuse.rearranging import Taken, dense_capacity, rearranged
from streamjax.streaming.scan import read
from streamjax.streaming.state import StreamState

OLDEST = 5  # of so many anchors the one that was used least makes room


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Keys, turned back to position 0, and values of T tokens in every layer."""

    k: tuple[Float[Array, "K T D"], ...]
    v: tuple[Float[Array, "K T V"], ...]

    @property
    def length(self) -> int:
        return self.k[0].shape[1]

    def first(self, count: int) -> Tokens:
        return jax.tree.map(lambda x: x[:, :count], self)


@dataclasses.dataclass
class Anchor:
    """A chunk by itself, what the text in front adds to it, and how often it was used."""

    alone: Tokens
    offset: Tokens
    used: int = 0


class AnchorPool:
    """Chunks behind one text, most of them without being read there.

    The keys of a chunk turn to their places, exactly. What the text adds to keys and to values is, token by token, the
    mean of what it added to the anchors' tokens at that place, weighted by softmax(-d / temperature); d is the mean
    distance of their keys, or values, over layers, heads and channels. Where it is not clear whom a chunk is like, it
    is read behind the text in full and becomes an anchor: while fewer than two anchors are as long, or if the entropy
    of their weights, by the distance of all values, is above `threshold` of the most it can be. With a copy of the
    chunk among the anchors, and a temperature near 0, what comes is what reading gives.

    Attributes:
      anchors: newest last. placed, read: chunks that were put behind the text, and those of them that were read there.

    Args:
      model: the model that read the text and the chunks.
      front: one stream that has read the text into a `dense` cache. It is not changed.
      most: anchors; of the five oldest the one that was used least makes room.
      threshold: in 0..1: 0 reads every chunk, 1 none but the first two.
      temperature: above 0.

    Raises:
      ValueError: several streams, caches that do not keep everything, layers with latents, or numbers out of range.

    Example:
      >>> pool = sj.AnchorPool(model, sj.read(model, state, prompt))  # what stands in front of every chunk
      >>> state = pool.place(sj.encode_chunk(model, prompt), capacity=64)
      >>> pool.placed, pool.read
      (1, 1)
    """

    def __init__(
        self,
        model: Decoder,
        front: StreamState,
        *,
        most: Size = 20,
        threshold: Fraction = 0.3,
        temperature: Positive = 1.0,
    ):
        given = {"most": most, "threshold": threshold, "temperature": temperature}
        check_arguments(type(self).__init__, given, "AnchorPool")
        dense_capacity(model, front, "the text in front")
        if front.batch_size != 1:
            raise ValueError(f"AnchorPool puts chunks behind one stream, and there are {front.batch_size}")
        if any(isinstance(block.mixer, LatentAttentionConfig) for block in model.config.blocks):
            raise ValueError("AnchorPool is for models with keys and values in each head: this one has latents")
        self._model, self._front = model, front
        self._most, self._threshold, self._temperature = most, threshold, temperature
        self.anchors: list[Anchor] = []
        self.placed = self.read = 0

    def place(self, chunk: EncodedChunk, *, capacity: int | None = None) -> StreamState:
        """The stream of the text with the chunk behind it. Read something next: nothing predicts the next token.

        Args:
          chunk: one row, behind whatever prefix it was read.
          capacity: of the new state, tokens to come included; as many as there are where None.

        Raises:
          ValueError: several rows, or too little room.
        """
        if len(chunk.tokens) != 1:
            raise ValueError(f"AnchorPool puts one chunk behind the text, and this one has {len(chunk.tokens)} rows")
        first, length = chunk.prefix.shape[1], chunk.tokens.shape[1]
        before = int(np.asarray(self._front.seen)[0])
        whole = before + length if capacity is None else capacity
        alone = self._tokens_of(chunk.state, first, length)
        fitting = [anchor for anchor in self.anchors if anchor.alone.length >= length]
        weights = None if len(fitting) < 2 else _likeness(alone, [anchor.alone.first(length) for anchor in fitting])
        if weights is None or _entropy(weights) > self._threshold * np.log2(len(fitting)):
            state = rearranged(self._model, [self._all(self._front, before)], whole, _no_ids(), _no_places())
            state = read(self._model, state, chunk.tokens)
            there = self._tokens_of(state, before, length)
            self._keep(Anchor(alone, jax.tree.map(jnp.subtract, there, alone)))
            self.read += 1
        else:
            for anchor, weight in zip(fitting, weights, strict=True):
                anchor.used += weight > 1 / len(fitting)
            rows = [(anchor.alone.first(length), anchor.offset.first(length)) for anchor in fitting]
            moved = self._moved(chunk.state, first, _predicted(alone, rows, self._temperature))
            place = np.arange(first + length)
            source = Taken(moved, place >= first, np.full(len(place), before - first))
            state = rearranged(
                self._model, [self._all(self._front, before), source], whole, _no_ids(), _no_places()
            )  # fmt: skip
        self.placed += 1
        return state

    def _all(self, state: StreamState, count: int) -> Taken:
        return Taken(state, np.ones(count, bool), np.zeros(count, int))

    def _keep(self, anchor: Anchor) -> None:
        if len(self.anchors) == self._most:
            oldest = self.anchors[:OLDEST]
            self.anchors.pop(min(range(len(oldest)), key=lambda i: oldest[i].used))
        self.anchors.append(anchor)

    def _rotaries(self, state: StreamState) -> list[Rotary | None]:
        mixers = [block.attention for block in self._model.config.blocks]
        return [None if m.rope is None else make_rotary(m.rope, m.head_dim, state.span) for m in mixers]

    def _tokens_of(self, state: StreamState, first: int, count: int) -> Tokens:
        """Some tokens of a dense stream."""
        keys, values = [], []
        for (held,), rotary in zip(state.layers, self._rotaries(state), strict=True):
            k, v, position = (x[:, :, first : first + count] for x in (held.k, held.v, held.position))
            keys.append(k[0] if rotary is None else rotary.moved(k, -position)[0])
            values.append(v[0])
        return Tokens(tuple(keys), tuple(values))

    def _moved(self, state: StreamState, first: int, offset: Tokens) -> StreamState:
        """A dense stream with something added to its tokens from `first` on."""
        layers = []
        for i, ((held,), rotary) in enumerate(zip(state.layers, self._rotaries(state), strict=True)):
            stop = first + offset.length
            more, position = offset.k[i][None], held.position[:, :, first:stop]
            turned = more if rotary is None else rotary.moved(more, position)
            k = held.k.at[:, :, first:stop].add(turned.astype(held.k.dtype))
            v = held.v.at[:, :, first:stop].add(offset.v[i][None].astype(held.v.dtype))
            layers.append((dataclasses.replace(held, k=k, v=v),))
        return dataclasses.replace(state, layers=tuple(layers))


@jax.jit
def _distances(alone: Tokens, other: Tokens) -> Float[Array, ""]:
    """The length of all differences of values together."""
    pairs = zip(alone.v, other.v, strict=True)
    return jnp.sqrt(sum(jnp.sum(jnp.square((x - y).astype(jnp.float32))) for x, y in pairs))


def _likeness(alone: Tokens, others: Sequence[Tokens]) -> Float[np.ndarray, " N"]:
    """How much a chunk is like each of several, in sum 1."""
    found = np.array([float(_distances(alone, other)) for other in others])
    weights = np.exp(found.min() - found)
    return weights / weights.sum()


def _entropy(weights: Float[np.ndarray, " N"]) -> float:
    return float(-np.sum(weights * np.log2(np.maximum(weights, 1e-40))))


@partial(jax.jit, static_argnames="temperature")
def _predicted(alone: Tokens, anchors: Sequence[tuple[Tokens, Tokens]], temperature: float) -> Tokens:
    """What the text in front is likely to add to a chunk, by anchors and what it added to them."""

    def mean(mine: tuple[Array, ...], theirs: list[tuple[Array, ...]], added: list[tuple[Array, ...]]) -> tuple:
        def far(other: tuple[Array, ...]) -> Float[Array, " T"]:
            apart = [
                jnp.mean(jnp.abs((x - y).astype(jnp.float32)), axis=(0, 2)) for x, y in zip(mine, other, strict=True)
            ]
            return sum(apart, jnp.zeros_like(apart[0])) / len(apart)

        weights = jax.nn.softmax(-jnp.stack([far(other) for other in theirs]) / temperature, axis=0)
        return tuple(
            jnp.einsum("nt,nktd->ktd", weights, jnp.stack(layer).astype(jnp.float32), precision="highest")
            for layer in zip(*added, strict=True)
        )

    return Tokens(
        mean(alone.k, [a.k for a, _ in anchors], [o.k for _, o in anchors]),
        mean(alone.v, [a.v for a, _ in anchors], [o.v for _, o in anchors]),
    )


def _no_ids() -> np.ndarray:
    return np.zeros((1, 0), np.int64)


def _no_places() -> np.ndarray:
    return np.zeros(0, np.int64)
