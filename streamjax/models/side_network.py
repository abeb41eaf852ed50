"""A side network beside a frozen decoder, which recalls what a layer of the decoder left behind (LongMem, 2306.07174).

The side network has one layer for every few of the decoder. It reads the decoder's embedding, and behind each of its
layers what the decoder's layers of that stretch have added to the residual stream is added to its own:
h' = h + s (f(h) - h) + (x' - x), with f a layer that began as the last one of the stretch, and s a learned number, 1 in
the paper. In one of its layers a query also attends to a `Bank` of the decoder's own keys and values, and a gate of
each head, a sigmoid of a learned number, mixes both. Logits are those of its last hidden states. With s = 0 in all
layers they are the decoder's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from streamjax.field_checks import Count, Size, check_fields
from streamjax.kv.cache import Cache, Deferred
from streamjax.kv.cascade import Cascade
from streamjax.kv.query import State
from streamjax.kv.tiers.bank import Bank
from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig, ModelConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import Attention, ChunkContext, query_and_tokens
from streamjax.models.norms import Norm


@dataclasses.dataclass(frozen=True)
class SideConfig:
    """Where a side network stands.

    Attributes:
      layer: of the decoder, whose keys and values are remembered; the side layer of its stretch recalls them.
      reduction: layers of the decoder for each side layer.
    """

    layer: Count
    reduction: Size = 2

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def for_model(cls, config: ModelConfig, layer: int | None = None, reduction: int = 2) -> SideConfig:
        """With the layer of the published models, seven tenths of the way up, where none is given.

        Raises:
          ValueError: a model that can have no side network, or a layer that it lacks.
        """
        last = config.num_layers // max(reduction, 1) * max(reduction, 1) - 1
        if last < 0:
            raise ValueError(f"reduction is {reduction}: the model has {config.num_layers} layers")
        found = cls(min(round(0.7 * config.num_layers), last) if layer is None else layer, reduction)
        found.check(config)
        return found

    def sources(self, config: ModelConfig) -> tuple[int, ...]:
        """The decoder's layer that each side layer begins as."""
        return tuple(range(self.reduction - 1, config.num_layers, self.reduction))

    @property
    def recalling(self) -> int:
        """The side layer that reads the bank."""
        return self.layer // self.reduction

    def check(self, config: ModelConfig) -> None:
        """Raise a ValueError unless a model can have this side network."""
        blocks, sources = config.blocks, self.sources(config)
        if (
            config.hsa is not None
            or config.stream_width > config.d_model
            or any(block.beside is not None for block in blocks)
        ):
            raise ValueError("a side network is for models whose layers see a residual stream and keep keys and values")
        if not all(isinstance(block.mixer, AttentionConfig) for block in blocks):
            raise ValueError("a side network is for models with attention in every layer")
        if self.recalling >= len(sources):
            raise ValueError(f"SideConfig.layer is {self.layer}: the last that can be remembered is {sources[-1]}")
        kept, recalls = blocks[self.layer].mixer, blocks[sources[self.recalling]].mixer
        assert isinstance(kept, AttentionConfig)
        if kept.bound is not None or kept != recalls:
            raise ValueError(
                f"layer {self.layer} cannot be remembered: it needs full attention, and the heads and rotation of "
                f"layer {sources[self.recalling]}"
            )


class SideNetwork(nnx.Module):
    """The trained part.

    Args:
      config: where it stands.
      layers: one for each stretch of the decoder.
      norm: behind the last one.
      scale: s of every layer at the beginning.
    """

    def __init__(self, config: SideConfig, layers: Sequence[Block], norm: Norm, scale: float = 1.0):
        self.config = config
        self.layers = nnx.List(layers)
        self.norm = norm
        recalls = layers[config.recalling].config.mixer
        assert isinstance(recalls, AttentionConfig)
        self.gate = nnx.Param(jnp.zeros((recalls.num_heads,), jnp.float32), axes=("heads",))
        self.scale = nnx.Param(jnp.full((len(layers),), scale, jnp.float32), axes=("layers",))

    @classmethod
    def beginning(cls, model: Decoder, config: SideConfig, scale: float = 1.0) -> SideNetwork:
        """Before training: copies of the decoder's own layers and of its last norm."""
        config.check(model.config)
        layers = [jax.tree.map(jnp.copy, model.layer(i)) for i in config.sources(model.config)]
        return cls(config, layers, jax.tree.map(jnp.copy, model.norm), scale)

    @classmethod
    def empty(cls, model: ModelConfig, config: SideConfig, dtype: DTypeLike) -> SideNetwork:
        """One whose numbers mean nothing, as it would be for a model of this configuration."""
        config.check(model)
        key, dtype = jax.random.key(0), jnp.dtype(dtype)
        layers = [Block(model.blocks[i], model.d_model, key, dtype) for i in config.sources(model)]
        return cls(config, layers, Norm(model.d_model, model.norm, dtype))


class SideDecoder(Decoder):
    """A decoder with a side network, whose logits it gives. For streams: `sj.score`, `sj.step`, `sj.generate`, ...

    The states and caches of the side layers lie behind those of the decoder's.
    """

    def __init__(self, model: Decoder, side: SideNetwork):
        side.config.check(model.config)
        for name, part in vars(model).items():
            if not name.startswith("_"):  # of the module's own account of itself
                setattr(self, name, part)
        self.side = side

    @property
    def streamed(self) -> ModelConfig:
        blocks = self.config.blocks
        return self.config.replace(blocks=blocks + tuple(blocks[i] for i in self.side.config.sources(self.config)))

    @property
    def by_layers(self) -> bool:
        return False

    @property
    def remembered(self) -> int:
        return self.side.config.layer

    def hidden(self, *args: object, **kwargs: object) -> Float[Array, "B T E"]:
        raise ValueError("a side network reads streams, not whole sequences: use sj.score, sj.step or sj.generate")

    def stream(
        self,
        tokens: Int[Array, "B C"],
        states: Sequence[State],
        caches: Sequence[Cache],
        context: ChunkContext,
        memorise: int | None = None,
        embedded: Float[Array, "B C W"] | None = None,
    ) -> tuple[Float[Array, "B C E"], tuple[State, ...]]:
        """Hidden states of the side network for one chunk; a reverse mode there is through the side network alone."""
        side, count, new = self.side, self.config.num_layers, list(states)
        frozen = dataclasses.replace(context, differentiable=False)
        x = before = h = self.embed(tokens) if embedded is None else embedded
        for i in range(count):
            x, new[i], _ = self.layer(i).stream(x, states[i], caches[i], frozen)
            own, end = divmod(i + 1, side.config.reduction)
            if end == 0:
                at = count + own - 1
                bank = self._bank(states, caches) if own - 1 == side.config.recalling else None
                y, new[at] = recalled(side, own - 1, h, states[at], caches[at], context, bank)
                scale = side.scale[...][own - 1].astype(h.dtype)
                h = h + scale * (y - h) + (x - before)
                before = x
        return side.norm(h + (x - before)), tuple(new)

    def _bank(self, states: Sequence[State], caches: Sequence[Cache]) -> tuple[Bank, State] | None:
        """The bank and what it held before the chunk; None where the layer's cache has none."""
        cache = caches[self.side.config.layer]
        cache = cache.cache if isinstance(cache, Deferred) else cache
        last = cache.tiers[-1] if isinstance(cache, Cascade) else None
        return (last, states[self.side.config.layer][-1]) if isinstance(last, Bank) else None


def recalled(
    side: SideNetwork,
    index: int,
    x: Float[Array, "B C E"],
    state: State,
    cache: Cache,
    context: ChunkContext,
    bank: tuple[Bank, State] | None,
) -> tuple[Float[Array, "B C E"], State]:
    """A side layer over one chunk, with what its queries find in a bank, if there is one, and the state it leaves."""
    block = side.layers[index]
    if bank is None:
        y, state, _ = block.stream(x, state, cache, context)
        return y, state
    tier, held = bank
    assert isinstance(block.mixer, Attention)
    raw_q, raw_k, v, _ = block.mixer.projections.split_gated(block.mixer_input(x))
    query, tokens = query_and_tokens(block.mixer, raw_q, raw_k, v, context, cache.needs_outputs)
    near, state = cache.update(state, query, tokens)
    far = tier.recall(held, query)
    share = jnp.where(jnp.isfinite(far.lse), jax.nn.sigmoid(side.gate[...]), 0.0)[..., None]
    return block.combine(x, (near + share * (far.out - near)).astype(raw_q.dtype)), state
