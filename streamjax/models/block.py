"""A decoder's layer: a token mixer and an MLP around the residual stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from streamjax.kv.cache import Cache
from streamjax.kv.tier import State
from streamjax.kv.tiers.landmark_memory import ChunkMemory
from streamjax.models.config import LayerSpec, ModelConfig
from streamjax.models.mixers.attention import Attention, ChunkContext, SequenceContext
from streamjax.models.mixers.hierarchical import HierarchicalAttention, PageEncoder, ReadablePages, whole_view
from streamjax.models.mlps.dense import MLP
from streamjax.models.norms import Norm
from streamjax.parallel.rules import constrain


class Block(nnx.Module):
    """One layer: a token mixer and an MLP around a residual stream, sequential or parallel.

    With hierarchical sparse attention a layer may have an encoder, which makes a chunk memory of the layer's input, and
    a branch that reads a memory, between the mixer and the MLP.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, key: Array, dtype: jnp.dtype):
        key_mixer, key_mlp = jax.random.split(key)
        self.config = config
        self.encoder = PageEncoder(config, jax.random.fold_in(key, 0), dtype) if spec.remembers else None
        self.reader = HierarchicalAttention(config, jax.random.fold_in(key, 1), dtype) if spec.reads else None
        self.mixer_norm = Norm(config.d_model, config, dtype)
        self.mixer = Attention(config, spec, key_mixer, dtype)
        self.mlp_norm = None if config.shared_norm else Norm(config.d_model, config, dtype)
        self.mlp = MLP(config, key_mlp, dtype)
        self.mixer_post_norm = Norm(config.d_model, config, dtype) if config.post_norms else None
        self.mlp_post_norm = Norm(config.d_model, config, dtype) if config.post_norms else None

    def parallel(
        self, x: Float[Array, "B T E"], context: SequenceContext, memory: ReadablePages | None = None
    ) -> tuple[Float[Array, "B T E"], ReadablePages | None]:
        """The layer over a whole sequence, and the chunk memory for the layers above: `memory`, or its own."""
        if self.encoder is not None:
            made = self.encoder.parallel(x, context.segment_ids)
            memory = whole_view(*made, context.segment_ids, self.config, 0, x.shape[1])
        normed = self.mixer_norm(x)
        return self._residual(x, normed, self.mixer.parallel(normed, context), memory), memory

    def project(
        self, x: Float[Array, "B T E"], context: SequenceContext
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """The layer up to attention, token by token: rotated queries and keys, and values."""
        return self.mixer.project(self.mixer_norm(x), context)

    def keys(
        self, x: Float[Array, "B T E"], context: SequenceContext
    ) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Keys and values of `project` alone."""
        return self.mixer.keys(self.mixer_norm(x), context)

    def combine(
        self, x: Float[Array, "B T E"], heads: Float[Array, "B T H D"], memory: ReadablePages | None = None
    ) -> Float[Array, "B T E"]:
        """The layer behind attention, token by token: from its input and the heads' outputs to its output."""
        return self._residual(x, self.mixer_norm(x), self.mixer.projections.join(heads, x.dtype), memory)

    def stream(
        self,
        x: Float[Array, "B C E"],
        state: State,
        cache: Cache,
        context: ChunkContext,
        memory: ReadablePages | None = None,
    ) -> tuple[Float[Array, "B C E"], State, ReadablePages | None]:
        """The layer over one chunk of a stream, its state, and the chunk memory for the layers above."""
        if self.encoder is not None:
            state, memory = self.memorise(x, state, cache, context)
        normed = self.mixer_norm(x)
        mixed, state = self.mixer.stream(normed, state, cache, context)
        return self._residual(x, normed, mixed, memory), state, memory

    def memorise(
        self, x: Float[Array, "B C E"], state: State, cache: Cache, context: ChunkContext
    ) -> tuple[State, ReadablePages]:
        """The state of a memory layer with a chunk's pages in it, and what the chunk's tokens may read."""
        assert self.encoder is not None
        assert isinstance(cache, ChunkMemory)
        count = jnp.sum(context.valid, axis=1, dtype=jnp.int32)
        made, memory = self.encoder.stream(x, state[1], cache, count)
        return (state[0], made), memory

    def _residual(self, x: Array, normed: Array, mixed: Array, memory: ReadablePages | None) -> Array:
        if self.mixer_post_norm is not None:
            mixed = self.mixer_post_norm(mixed)
        if self.reader is not None:
            assert memory is not None
            mixed = mixed + self.reader(x if self.config.parallel_residual else x + mixed, memory)
        if self.config.parallel_residual:
            y = x + mixed + self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))
        else:
            x = x + mixed
            assert self.mlp_norm is not None
            y = self.mlp(self.mlp_norm(x))
            y = x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y))
        return constrain(y, "batch", "length", "activation_embed")
