"""Convolutions that say how tokens a cache cannot keep flow into its slots, trained (LoCoCo, Cai et al., 2406.05317).

The model is frozen. A stream reads a text in chunks under the cache itself, whose state has the weights; the loss is
what the tokens behind the first merges cost, and its gradient goes through all that was merged back to the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int32

from streamjax.field_checks import Fraction, Positive, Size, check_fields
from streamjax.kv.cascade import Cascade
from streamjax.kv.merging.kernel_file import LayerKernels
from streamjax.kv.merging.lococo import Convolved, Kernels
from streamjax.kv.scores.snapkv import SnapKV
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.window import Window
from streamjax.models.config import AttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.state import StreamState, budgeted_layers, init_state
from streamjax.streaming.step import advance, surprise

Weights = dict[int, tuple[Float[Array, "M C w"], Float[Array, " M"], Float[Array, "1"]]]


@dataclasses.dataclass(frozen=True)
class ConvolutionConfig:
    """How convolutions are trained, and the cache in which they are.

    Attributes:
      steps: of Adam.
      learning_rate: of Adam.
      slots: of each head that a convolution fills.
      width: tokens that it sees at once, an odd number.
      blend: its share at first.
      window, size, every: as the options of the preset "lococo"; chunks are of `every` tokens.
    """

    steps: Size = 1000
    learning_rate: Positive = 1e-3
    slots: Size = 64
    width: Size = 21
    blend: Fraction = 0.5
    window: Size = 64
    size: Size = 128
    every: Size = 64

    def __post_init__(self) -> None:
        check_fields(self)
        if self.width % 2 == 0:
            raise ValueError(f"ConvolutionConfig.width is {self.width}: it must be odd, a token and its neighbours")
        if self.slots > self.size:
            raise ValueError(f"ConvolutionConfig.slots is {self.slots}, and size is {self.size}: it must be larger")

    @property
    def held(self) -> int:
        """Tokens behind which something has been merged."""
        return -(-(self.window + self.size + self.every) // self.every) * self.every


class ConvolutionStep(NamedTuple):
    """Convolutions behind a step, and what a token cost before it, in nats."""

    weights: Weights
    loss: float


def first_weights(model: Decoder, config: ConvolutionConfig, seed: int = 0) -> Weights:
    """Convolutions before the first step, of every layer that chooses what it keeps.

    Raises:
      ValueError: a model without such a layer, or one whose layer has no heads.
    """
    draw = np.random.default_rng(seed)
    weights: Weights = {}
    for i in budgeted_layers(model.config):
        mixer = model.config.blocks[i].mixer
        if not isinstance(mixer, AttentionConfig):
            raise ValueError(f"layer {i} has no heads whose tokens could be merged: {type(mixer).__name__}")
        shape = config.slots, 2 * mixer.head_dim, config.width
        kernel = draw.normal(size=shape) / np.sqrt(shape[1] * shape[2])
        bias, blend = np.zeros(config.slots), np.full(1, config.blend)
        weights[i] = jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32), jnp.asarray(blend, jnp.float32)
    if not weights:
        raise ValueError("every layer of the model has a bound of its own: none has tokens that could be merged")
    return weights


def train_convolutions(
    model: Decoder, batches: Iterable[np.ndarray | Array], config: ConvolutionConfig, seed: int = 0
) -> Iterator[ConvolutionStep]:
    """Train the convolutions of a model, one step at a time; whoever reads the steps may stop anywhere.

    Args:
      model: stays as it is.
      batches: token ids [B, T], longer than the cache; they should not end before the steps do.
      config: how.
      seed: of the first weights.

    Raises:
      ValueError: rows that are no longer than what the cache holds; a model without a layer that chooses.
    """
    weights = first_weights(model, config, seed)
    optimizer = optax.adam(config.learning_rate)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(weights: Weights, moments: Any, model: Decoder, state: StreamState, tokens: Array) -> tuple:
        loss, slope = jax.value_and_grad(stream_loss)(weights, model, state, tokens, config)
        change, moments = optimizer.update(slope, moments)
        return optax.apply_updates(weights, change), moments, loss

    moments = optimizer.init(weights)
    for _, tokens in zip(range(config.steps), batches, strict=False):
        if tokens.shape[1] <= config.held:
            raise ValueError(f"rows of {tokens.shape[1]} tokens: the first merges lie in front of token {config.held}")
        state = _fresh(model, config, weights, tokens.shape[0])
        weights, moments, loss = update(weights, moments, model, state, jnp.asarray(tokens))
        yield ConvolutionStep(jax.tree.map(jnp.copy, weights), float(loss))


def stream_loss(
    weights: Weights, model: Decoder, state: StreamState, tokens: Int32[Array, "B T"], config: ConvolutionConfig
) -> Float[Array, ""]:
    """Nats a token behind the first merges, of a stream whose state has these weights."""
    model = jax.lax.stop_gradient(model)
    layers = list(state.layers)
    for i, arrays in weights.items():
        window, scored = layers[i]
        own = tuple(jnp.broadcast_to(x, (state.batch_size, 1, *x.shape)) for x in arrays)
        layers[i] = window, dataclasses.replace(scored, joining=own)
    state = dataclasses.replace(state, layers=tuple(layers))

    @jax.checkpoint
    def read(state: StreamState, piece: Array) -> tuple[StreamState, Float[Array, "B C"]]:
        new, hidden = advance(model, state, piece, differentiable=True)
        count = jnp.full((piece.shape[0],), piece.shape[1], jnp.int32)
        return new, surprise(model, state, hidden, piece, count)

    whole = tokens.shape[1] // config.every  # chunks, which one program reads in turn
    chunks = rearrange(tokens[:, : whole * config.every], "b (n c) -> n b c", n=whole)
    state, costs = jax.lax.scan(read, state, chunks)
    nats = rearrange(costs, "n b c -> b (n c)")
    if nats.shape[1] < tokens.shape[1]:
        nats = jnp.concatenate((nats, read(state, tokens[:, nats.shape[1] :])[1]), axis=1)
    return jnp.mean(nats[:, config.held :])


def _fresh(model: Decoder, config: ConvolutionConfig, weights: Weights, rows: int) -> StreamState:
    """Streams that have read nothing, whose weights are still to be put in."""
    kernel, bias, _ = next(iter(weights.values()))
    merge = Convolved(kernels=Kernels.from_arrays(np.zeros(kernel.shape), np.zeros(bias.shape), 0.0, ""))
    kept = Scored(config.size, SnapKV(config.every, 1), every=config.every, merge=merge)
    state = init_state(model, Cascade(Window(config.window), kept), rows)
    return dataclasses.replace(state, caches=tuple(cache.renumbered()[0] for cache in state.caches))


def as_file(model: Decoder, weights: Weights, tokens: int) -> LayerKernels:
    """Convolutions, for `save`; `tokens`: how many were read so far."""
    own = fingerprint_in_any_dtype(model)
    layers: list[Any] = []
    for i, block in enumerate(model.config.blocks):
        if i in weights:
            kernel, bias, blend = (np.asarray(x) for x in weights[i])
            layers.append(Kernels.from_arrays(kernel, bias, float(blend[0]), own))
        else:
            window, chunk = block.mixer.window, block.mixer.chunk
            layers.append(("chunk", chunk) if chunk is not None else ("window", window))
    return LayerKernels(tuple(layers), own, tokens)
