"""A decoder's layer: a token mixer and an MLP around the residual stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from streamjax.kv.cache import Cache
from streamjax.kv.layer_caches.recurrence import BesideRecurrence, RecurrentState
from streamjax.kv.query import State
from streamjax.kv.tiers.landmark_memory import ChunkMemory
from streamjax.models.config import BlockConfig, HSAConfig
from streamjax.models.layer_inputs import LayerInput
from streamjax.models.mixers.attention import Attention, ChunkContext, SequenceContext
from streamjax.models.mixers.build import build_mixer
from streamjax.models.mixers.hierarchical import HierarchicalAttention, PageEncoder, ReadablePages
from streamjax.models.mixers.latent import LatentAttention
from streamjax.models.mixers.recurrent import RecurrentMixer
from streamjax.models.mlps.build import build_mlp
from streamjax.models.norms import Norm
from streamjax.parallel.rules import constrain

ToRead = ReadablePages | Float[Array, "B C H D"]  # pages of a chunk memory, or what was read in them


class Block(nnx.Module):
    """One layer: a token mixer and an MLP around a residual stream, sequential or parallel.

    With hierarchical sparse attention a layer may have an encoder, which makes a chunk memory of the layer's input, and
    a branch that reads a memory, between the mixer and the MLP.

    Args:
      config: which mixer, MLP and norms.
      d_model: channels of the residual stream.
      key: PRNG key of the initial weights.
      dtype: of parameters.
      gain: of the initial weights of what goes back to the residual stream.
      memory: hierarchical sparse attention, whether the layer's input becomes a chunk memory, and whether the layer
        reads one; None where the model has no memory.
      handed: channels of the stream in front of those that the layer hands on or takes, and of all layers' inputs.
    """

    def __init__(
        self,
        config: BlockConfig,
        d_model: int,
        key: Array,
        dtype: jnp.dtype,
        gain: float = 1.0,
        memory: tuple[HSAConfig, bool, bool] | None = None,
        handed: tuple[int, int] = (0, 0),
    ):
        key_mixer, key_mlp = jax.random.split(key)
        hsa, remembers, reads = memory or (None, False, False)
        self.config = config
        self.width = d_model
        self.handed_at, self.inputs = handed[0] - d_model, handed[1]
        self.hsa = hsa
        key_encoder, key_reader = (jax.random.fold_in(key, i) for i in range(2))
        own = hsa.of_layer(config) if hsa and (remembers or reads) else config
        self.encoder = PageEncoder(own, hsa, d_model, key_encoder, dtype, gain) if hsa and remembers else None
        self.reader = HierarchicalAttention(own, d_model, key_reader, dtype, gain) if reads else None
        self.mixer_norm = Norm(d_model, config.norm, dtype) if config.pre_norms else None
        self.mixer = build_mixer(config.mixer, d_model, key_mixer, dtype, gain)
        key_beside = jax.random.fold_in(key, 2)
        beside = None if config.beside is None else build_mixer(config.beside, d_model, key_beside, dtype, gain)
        assert beside is None or isinstance(beside, RecurrentMixer)
        self.beside: RecurrentMixer | None = beside
        apart = config.pre_norms and not config.shared_norm and config.mlp is not None and not config.own_norms
        self.mlp_norm = Norm(d_model, config.norm, dtype) if apart else None
        self.mlp = None if config.mlp is None else build_mlp(config.mlp, d_model, key_mlp, dtype, gain)
        self.mixer_post_norm = Norm(d_model, config.norm, dtype) if config.post_norms else None
        behind = config.post_norms and config.mlp is not None
        self.mlp_post_norm = Norm(d_model, config.norm, dtype) if behind else None
        key_input, given = jax.random.fold_in(key, 3), config.layer_input
        self.layer_input = None if given is None else LayerInput(given, d_model, config.norm, key_input, dtype, gain)
        self.scale = nnx.Param(jnp.ones((1,), dtype), axes=("gates",)) if config.layer_scale else None

    @property
    def attention(self) -> Attention | LatentAttention:
        """The token mixer of a layer that attends."""
        assert not isinstance(self.mixer, RecurrentMixer)
        return self.mixer

    def parallel(
        self, x: Float[Array, "B T E"], context: SequenceContext, memory: ReadablePages | None = None
    ) -> tuple[Float[Array, "B T E"], ReadablePages | None]:
        """The layer over a whole sequence, and the chunk memory for the layers above: `memory`, or its own."""
        if self.encoder is not None:
            memory = self.encoder.parallel(x, context.segment_ids)
        return self.join(x, self.mix(x, context), memory), memory

    def join(
        self, x: Float[Array, "B T E"], mixed: Float[Array, "B T V"], memory: ToRead | None = None
    ) -> Float[Array, "B T E"]:
        """The layer's output, from its input and what its token mixers have made of it."""
        return self._residual(x, self.mixer_input(x), mixed, memory)

    def mix(self, x: Float[Array, "B T W"], context: SequenceContext) -> Float[Array, "B T V"]:
        """What the token mixers make of a whole sequence, before it is added to the residual stream."""
        normed = self.mixer_input(x)
        mixed = self.mixer.parallel(normed, context)
        return mixed if self.beside is None else mixed + self.beside.parallel(normed, context)

    def mixer_input(self, x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """What the token mixer reads of the layer's input; behind it what it takes of a layer below."""
        x, handed = self._apart(x)
        normed = x if self.mixer_norm is None else self.mixer_norm(x)
        received = self.config.received
        if handed is None or not received:
            return normed
        return jnp.concatenate((normed, handed[..., self.handed_at : self.handed_at + received]), axis=-1)

    def _apart(self, x: Float[Array, "B T W"]) -> tuple[Float[Array, "B T E"], Float[Array, "B T S"] | None]:
        """The residual stream, and what layers hand on behind it, if they do."""
        return (x, None) if x.shape[-1] == self.width else (x[..., : self.width], x[..., self.width :])

    def project(
        self, x: Float[Array, "B T E"], context: SequenceContext
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """The layer up to attention, token by token: rotated queries and keys, and values."""
        return self.attention.project(self.mixer_input(x), context)

    def keys(
        self, x: Float[Array, "B T E"], context: SequenceContext
    ) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Keys and values of `project` alone."""
        return self.attention.keys(self.mixer_input(x), context)

    def combine(
        self,
        x: Float[Array, "B T E"],
        heads: Float[Array, "B T H D"],
        memory: ToRead | None = None,
        beside: Float[Array, "B T V"] | None = None,
    ) -> Float[Array, "B T E"]:
        """The layer behind attention, token by token: from its input and the heads' outputs to its output.

        beside: what `recur_beside` gives, where the layer has a recurrent mixer beside its attention.
        """
        return self._residual(x, self.mixer_input(x), self.attended(x, heads, beside), memory)

    def attended(
        self, x: Float[Array, "B T E"], heads: Float[Array, "B T H D"], beside: Float[Array, "B T V"] | None = None
    ) -> Float[Array, "B T V"]:
        """What the token mixers make of the layer's input, where it attends; arguments as of `combine`."""
        mixed = self.attention.join(heads, self.mixer_input(x))
        return mixed if beside is None else mixed + beside

    def page_queries(
        self, x: Float[Array, "B T E"], mixed: Float[Array, "B T V"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"]]:
        """What the layer asks its chunk memory, from its input and what its token mixers have made of that."""
        assert self.reader is not None
        (x, _), (mixed, _) = map(self._apart, (x, mixed))
        mixed = self._branch(mixed, self.mixer_post_norm)
        return self.reader.queries(x if self.config.residual == "parallel" else x + mixed)

    def recur(
        self,
        x: Float[Array, "B C E"],
        state: RecurrentState,
        context: SequenceContext,
        memory: ReadablePages | None = None,
    ) -> tuple[Float[Array, "B C E"], RecurrentState]:
        """A recurrent layer over a stretch of a sequence, behind the state that those before it left."""
        assert isinstance(self.mixer, RecurrentMixer)
        normed = self.mixer_input(x)
        mixed, state = self.mixer.over(normed, state, context)
        return self._residual(x, normed, mixed, memory), state

    def recur_beside(
        self, x: Float[Array, "B C W"], state: RecurrentState, context: SequenceContext
    ) -> tuple[Float[Array, "B C V"], RecurrentState]:
        """What the recurrent mixer beside attention makes of a stretch of a sequence, and the state behind it."""
        assert self.beside is not None
        return self.beside.over(self.mixer_input(x), state, context)

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
        normed = self.mixer_input(x)
        if isinstance(cache, ChunkMemory) and isinstance(self.mixer, RecurrentMixer):
            assert cache.own is not None
            mixed, own = self.mixer.stream(normed, state[0], cache.own, context)
            state = (own, state[1])
        elif self.beside is None:
            mixed, state = self.mixer.stream(normed, state, cache, context)
        else:
            assert isinstance(cache, BesideRecurrence)
            own, beside = state
            mixed, own = self.mixer.stream(normed, own, cache.attention, context)
            more, beside = self.beside.stream(normed, beside, cache.recurrence, context)
            mixed, state = mixed + more, (own, beside)
        return self._residual(x, normed, mixed, memory), state, memory

    def look_ahead(self, x: Float[Array, "B C W"], state: State, prefix: Bool[Array, "B C"]) -> State:
        """The layer's state when its recurrent mixer has looked at a part of a prefix; see `RecurrentMixer`."""
        if isinstance(self.mixer, RecurrentMixer):
            return self.mixer.look_ahead(self.mixer_input(x), state, prefix)
        if self.beside is None:
            return state
        own, beside = state
        return own, self.beside.look_ahead(self.mixer_input(x), beside, prefix)

    def memorise(
        self, x: Float[Array, "B C E"], state: State, cache: Cache, context: ChunkContext
    ) -> tuple[State, ReadablePages]:
        """The state of a memory layer with a chunk's pages in it, and what the chunk's tokens may read."""
        assert self.encoder is not None
        assert isinstance(cache, ChunkMemory)
        count = jnp.sum(context.valid, axis=1, dtype=jnp.int32)
        made, memory = self.encoder.stream(x, state[1], cache, count)
        return (state[0], made), memory

    def _residual(self, x: Array, normed: Array, mixed: Array, memory: ToRead | None) -> Array:
        parallel = self.config.residual == "parallel"
        (x, handed), (normed, _), (mixed, own) = map(self._apart, (x, normed, mixed))
        if own is not None and handed is not None:
            behind = handed[..., self.handed_at + own.shape[-1] :]
            handed = jnp.concatenate((handed[..., : self.handed_at], own, behind), axis=-1)
        mixed = self._branch(mixed, self.mixer_post_norm)
        if self.reader is not None:
            assert memory is not None
            mixed = mixed + self._branch(self.reader(x if parallel else x + mixed, memory))
        if not parallel:
            x = normed = x + mixed
        if self.mlp is not None:
            y = self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))
            y = self._branch(y, self.mlp_post_norm)
            x = x + mixed + y if parallel else x + y
        if self.layer_input is not None and handed is not None:
            first, others, rest = jnp.split(handed, (self.layer_input.gate.shape[1], self.inputs), axis=-1)
            x = x + self.layer_input(x, first)
            handed = jnp.concatenate((others, first, rest), axis=-1)
        if self.scale is not None:
            x = x * jax.lax.stop_gradient(self.scale[...]).astype(x.dtype)
        x = x if handed is None else jnp.concatenate((x, handed), axis=-1)
        return constrain(x, "batch", "length", "activation_embed")

    def _branch(self, y: Array, norm: Norm | None = None) -> Array:
        """What a branch adds to the residual stream."""
        y = y if norm is None else norm(y)
        scale = self.config.residual_scale
        return y if scale == 1.0 else y * jnp.asarray(scale, y.dtype)
