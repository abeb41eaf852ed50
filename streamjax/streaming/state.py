"""The state of B endless streams: what every layer caches, and where each stream stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, UInt32

from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.channels.lent import Lent
from streamjax.kv.head_groups import HeadGroups
from streamjax.kv.layer_caches.current_chunk import CurrentChunk
from streamjax.kv.layer_caches.recurrence import BesideRecurrence, Recurrence
from streamjax.kv.layer_caches.slots_of import SlotsOf
from streamjax.kv.pages.page_pool import PageTables
from streamjax.kv.query import Implementation, KVSpec, State
from streamjax.kv.tiers.bank import Bank
from streamjax.kv.tiers.landmark_memory import ChunkMemory
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.window import Window
from streamjax.models.config import BlockConfig, LatentAttentionConfig, MixerConfig, ModelConfig
from streamjax.models.config.recurrent import RecurrentConfig
from streamjax.models.decoder import Decoder
from streamjax.models.rope import make_rotary
from streamjax.parallel.rules import constrain, map_state_axes
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype

SEEN_LIMIT = 2**30  # where the count of seen tokens saturates; every use of it compares with a cache's size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """A pytree; its size does not depend on how far the streams are.

    layers: the state of each layer's cache. position: of the next token, uint32 [B], modulo 2^32. seen: tokens so far,
    int32 [B], saturating at 2^30. hidden: final hidden state of the newest token, [B, E]: what predicts the next one.
    caches: the cache of each layer (static). span: positions in use at once (static). implementation: see `init_state`
    (static). used: which ids each stream has read, bool [B, V], for the repetition penalty; None where nobody asked.
    tables: where streams in a `PagePool` have their pages; None where no layer has one. shared: what groups of layers
    hold together (`Lent`), once each; None where no layers do.

    Example:
      >>> state = sj.read(model, state, prompt)
      >>> state.seen.tolist(), state.capacity, state.batch_size
      ([16], 128, 1)
    """

    layers: tuple[State, ...]
    position: UInt32[Array, " B"]
    seen: Int32[Array, " B"]
    hidden: Float[Array, "B E"]
    caches: tuple[Cache, ...] = dataclasses.field(metadata={"static": True})
    span: int = dataclasses.field(metadata={"static": True})
    implementation: Implementation | None = dataclasses.field(default=None, metadata={"static": True})
    used: Bool[Array, "B V"] | None = None
    tables: PageTables | None = None
    shared: tuple[State, ...] | None = None

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    @property
    def capacity(self) -> int | None:
        """Tokens that the fullest-going layer can hold, where a cache has an end; None for endless caches."""
        ends = [cache.capacity for cache in self.caches if cache.capacity is not None]
        return min(ends) if ends else None

    @property
    def cache_bytes(self) -> int:
        """Bytes of all arrays in the state, over all devices, replicas counted once."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def map_axes(self, fn: Callable[[Any, Sequence[str | None]], Any]) -> StreamState:
        """A copy with `fn(array, logical names of its dimensions)` in the place of every array."""
        return dataclasses.replace(
            self,
            layers=map_state_axes(fn, self.layers),
            position=fn(self.position, ("batch",)),
            seen=fn(self.seen, ("batch",)),
            hidden=fn(self.hidden, ("batch", "activation_embed")),
            used=None if self.used is None else fn(self.used, ("batch", "vocab")),
            tables=None if self.tables is None else self.tables.map_axes(fn),
            shared=None if self.shared is None else map_state_axes(fn, self.shared),
        )

    def noting_used(self, vocab_size: int) -> StreamState:
        """This state, which from now on notes the ids that its streams read; itself where it does so already."""
        if self.used is not None:
            return self
        used = jnp.zeros((self.batch_size, vocab_size), bool)
        return dataclasses.replace(self, used=constrain(used, "batch", "vocab"))

    def placed(self) -> StreamState:
        """This state, its arrays asked to lie where the mesh of `jax.set_mesh` wants them."""
        return self.map_axes(lambda x, axes: constrain(x, *axes))


def batch_axes(state: StreamState) -> StreamState:
    """The place of the batch among the dimensions of each array, in the array's place."""
    return state.map_axes(lambda x, axes: np.ndim(x) - len(axes) + list(axes).index("batch"))


def layer_caches(config: ModelConfig, cache: Cache | Sequence[Cache]) -> tuple[Cache, ...]:
    """The cascade of each layer.

    One cascade serves the model's global layers; layers with a sliding window W of their own keep `Window(W - 1)`, and
    those that attend within chunks their `CurrentChunk`, as pretrained; where a window sees sinks they stand in front
    of it, never farther than the model's `max_position`. A sequence gives every layer its own. Recurrent layers keep
    their state (`Recurrence`), whatever is given, and so do recurrent mixers beside attention; layers that read another
    layer's keys and values have that one's slots (`SlotsOf`). With hierarchical sparse attention the cache says how
    much of the stream is remembered: the newest tokens in whole chunks, as many as it has slots.

    Raises:
      ValueError: no cascade; a sequence whose length is not the number of layers; a model's window of one token; for a
        layer whose keys others read, a cache that chooses tokens as they come.
    """
    layers = range(config.num_layers)
    caches: tuple[Cache, ...]
    if isinstance(cache, Budgeted):
        free = budgeted_layers(config)
        sized = dict(zip(free, cache.for_layers(len(free)), strict=True))
        caches = tuple(sized.get(i, cache.cascade) for i in layers)
        keeps = [True] * config.num_layers
    elif isinstance(cache, Cache):
        caches, keeps = (cache,) * config.num_layers, [True] * config.num_layers
        mixers = [block.mixer for block in config.blocks]
        full = next((i for i in layers if mixers[i].reach is None and not mixers[i].recurrent), None)
        if isinstance(cache, ChunkMemory) and config.hsa is None:
            raise ValueError(
                "this cache is the memory of hierarchical sparse attention (hsa), which the model does not have: take "
                "another one, such as streaming_llm"
            )
        if isinstance(cache, ChunkMemory) and full is not None:
            raise ValueError(f"layer {full} has full attention: give it a cache of its own, one a layer")
    else:
        if isinstance(cache, Sequence):
            cache = [entry.attention if isinstance(entry, BesideRecurrence) else entry for entry in cache]
        if not isinstance(cache, Sequence) or not all(isinstance(entry, Cache) for entry in cache):
            raise ValueError(
                f"a cache is a Cascade, such as sj.kv.preset('dense'), or one for each layer; got {cache!r}"
            )
        if len(cache) != config.num_layers:
            raise ValueError(f"{len(cache)} caches for {config.num_layers} layers; give one for all, or one a layer")
        # Presets by heads have one cache a layer, and they too leave layers with windows of their own as they are.
        caches, keeps = tuple(cache), [isinstance(entry, HeadGroups) for entry in cache]
    fixed = [block.mixer.recurrent or block.mixer.keys_of is not None for block in config.blocks]
    own = [_pretrained(config, i, caches[i]) if keeps[i] or fixed[i] else caches[i] for i in layers]
    whole = [_remembering(config, i, caches[i], own[i]) for i in layers]
    _check_shared(whole)
    return tuple(_with_state_beside(block, cache) for block, cache in zip(config.blocks, whole, strict=True))


def _check_shared(caches: Sequence[Cache]) -> None:
    """Refuse caches that choose inside of a chunk where several layers read them: each would choose by its queries."""
    for reader, cache in enumerate(caches):
        if not isinstance(cache, SlotsOf):
            continue
        own = caches[cache.layer]
        cascades = [cascade for _, cascade in own.groups] if isinstance(own, HeadGroups) else [own]
        tiers = [tier for cascade in cascades if isinstance(cascade, Cascade) for tier in cascade.tiers]
        if any(tier.chooses_every is not None for tier in tiers):
            raise ValueError(
                f"layer {reader} reads what layer {cache.layer} keeps: a cache that chooses tokens as they come, such "
                "as h2o, is for models whose layers have keys of their own; take one such as streaming_llm or quest"
            )


def budgeted_layers(config: ModelConfig) -> list[int]:
    """The layers whose caches are a user's choice: those without a window, chunks or a state of their own."""
    mixers = [block.mixer for block in config.blocks]
    own = [m.recurrent or m.window is not None or m.chunk is not None or m.keys_of is not None for m in mixers]
    return [i for i, has_own in enumerate(own) if not has_own]


def rotated_otherwise(config: ModelConfig, *spans: int) -> int | None:
    """The first layer that rotates keys in another way for caches of one of these spans than of others, if any does."""
    for i, block in enumerate(config.blocks):
        if not block.mixer.recurrent and block.attention.rope is not None:
            rope, width = block.attention.rope, block.attention.head_dim
            if len({make_rotary(rope, width, span) for span in spans}) > 1:
                return i
    return None


def require_own_calibration(model: Decoder, cache: Cache | Sequence[Cache]) -> None:
    """Raise a ValueError where a budget, or what a cache ranks by, was measured with another model."""
    each = cache if isinstance(cache, Sequence) else [cache]
    made_for = next(filter(None, (one.made_for for one in each if isinstance(one, Cache))), None)
    if made_for is not None and made_for != (own := fingerprint_in_any_dtype(model)):
        made = f"what this cache knows was measured with model {made_for}"
        again = "sj.measure_filters, sj.measure_factors, sj.measure_codebooks or python -m train.retaining_heads"
        raise ValueError(f"{made}, and this one is {own}: measure it again, {again}")
    calibration = cache.calibration if isinstance(cache, Budgeted) else None
    if calibration is not None and calibration.model != (own := fingerprint_in_any_dtype(model)):
        made = f"this calibration is of model {calibration.model}"
        raise ValueError(f"{made}, and this one is {own}: measure it, sj.measure_budget(...)")


def _pretrained(config: ModelConfig, index: int, cache: Cache) -> Cache:
    """`cache`, or the window, the chunk or the recurrent state that the layer was trained with."""
    mixer = config.blocks[index].mixer
    if isinstance(mixer, RecurrentConfig):
        return _own_state(mixer)
    if mixer.keys_of is not None:
        return SlotsOf(mixer.keys_of)
    if mixer.reach == 1:
        kind = "a sliding window" if mixer.chunk is None else "attention chunks"
        raise ValueError(f"layer {index} has {kind} of 1: it sees itself alone and has no cache")
    if mixer.chunk is not None:
        return CurrentChunk(mixer.chunk)
    if mixer.window is None:
        return cache
    window = Window(mixer.window - 1)
    return Cascade(Sink(mixer.sinks, config.max_position), window) if mixer.sinks else Cascade(window)


def _own_state(mixer: RecurrentConfig) -> Recurrence:
    return Recurrence(mixer.state_shape, mixer.conv_shape)


def _with_state_beside(block: BlockConfig, cache: Cache) -> Cache:
    """`cache`, beside the state of a recurrent mixer where the layer has one beside its attention."""
    return cache if block.beside is None else BesideRecurrence(cache, _own_state(block.beside))


def _remembering(config: ModelConfig, index: int, cache: Cache, own: Cache) -> Cache:
    """`own`, with a chunk memory of `cache`'s size where the layer's input is remembered."""
    if config.hsa is None or not config.remembers(index):
        return own
    if isinstance(cache, ChunkMemory):
        if cache.size not in (0, config.hsa.chunk_size):
            raise ValueError(f"the model's memory has chunks of {config.hsa.chunk_size} tokens, the cache {cache.size}")
        memory, own = cache, cache.own or own
    else:
        memory = ChunkMemory(cache.slots)
    pages = -(-memory.capacity_tokens // config.hsa.chunk_size)
    top_k = memory.top_k or min(config.hsa.top_k, pages)
    return dataclasses.replace(memory, top_k=top_k, size=config.hsa.chunk_size, own=own)


def init_state(
    model: Decoder,
    cache: Cache | Sequence[Cache],
    batch_size: int = 1,
    *,
    position: int = 0,
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
    note_used: bool = False,
) -> StreamState:
    """The state of `batch_size` streams that have seen nothing.

    Args:
      model: the model that will read the streams.
      cache: a cascade for all layers, or one a layer; see `layer_caches`.
      batch_size: number of independent streams.
      position: stream position of the first token, modulo 2^32.
      dtype: of cached keys and values; the model's activation dtype where None.
      implementation: what single tokens attend to full caches, windows and chosen pages with: "pallas", the platform's
        kernels, or "xla". None takes a kernel where there is one, on one device, for caches that are long.
      note_used: note which ids the streams read, V bytes a stream, so that a repetition penalty meets all of them.
        Without it `generate` begins to note them when a sampler has a penalty.

    Raises:
      ValueError: `cache` is not a cascade or has the wrong number of entries; batch_size below 1; an unknown
        implementation.

    Example:
      >>> state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=4, window=60), batch_size=2)
      >>> state.batch_size, [cache.slots for cache in state.caches]
      (2, [64, 64])
    """
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"unknown implementation {implementation!r}: use 'xla', 'pallas' or None")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    require_own_calibration(model, cache)
    state = dataclasses.replace(empty_state(model, cache, batch_size, position, dtype), implementation=implementation)
    if state.shared is not None:
        raise ValueError("these caches hold what layers shared when they were compacted: no stream can begin with them")
    return state.noting_used(model.config.vocab_size) if note_used else state


def empty_state(
    model: Decoder,
    cache: Cache | Sequence[Cache],
    batch_size: int = 1,
    position: int = 0,
    dtype: DTypeLike | None = None,
) -> StreamState:
    """`init_state` without a look at the model's weights: its shapes under `jax.eval_shape` too."""
    caches = _with_own_bank(model, layer_caches(model.streamed, cache))
    start = np.uint32(position % 2**32)
    return _init(model.streamed, caches, batch_size, start, jnp.dtype(dtype or model.dtype), model.dtype)


def _with_own_bank(model: Decoder, caches: tuple[Cache, ...]) -> tuple[Cache, ...]:
    """The caches, with a bank in that layer alone whose tokens a side network recalls."""

    def without(cache: Cache) -> Cache:
        if not isinstance(cache, Cascade) or not isinstance(cache.tiers[-1], Bank) or len(cache.tiers) == 1:
            return cache
        return Cascade(*cache.tiers[:-1])

    return tuple(cache if i == model.remembered else without(cache) for i, cache in enumerate(caches))


@partial(jax.jit, static_argnames=("config", "caches", "batch_size", "dtype", "hidden_dtype"))
def _init(
    config: ModelConfig,
    caches: tuple[Cache, ...],
    batch_size: int,
    position: UInt32[Array, ""],
    dtype: jnp.dtype,
    hidden_dtype: jnp.dtype,
) -> StreamState:
    def init(layer: int, cache: Cache) -> State:
        block = config.blocks[layer]
        if isinstance(cache, ChunkMemory) and cache.own is not None:
            own = cache.own.init(spec(block.mixer, cache.own))
            return own, cache.empty(spec(config.memory_block(layer).mixer, cache))
        if isinstance(cache, BesideRecurrence):
            assert block.beside is not None
            beside = cache.recurrence.init(spec(block.beside, cache.recurrence))
            return cache.attention.init(spec(block.mixer, cache.attention)), beside
        return cache.init(spec(block.mixer, cache))

    def spec(mixer: MixerConfig, cache: Cache) -> KVSpec:
        if isinstance(mixer, RecurrentConfig):  # which has no keys and values to be kept in a dtype of their own
            return KVSpec(batch_size, mixer.num_groups, 0, hidden_dtype)
        shared = isinstance(mixer, LatentAttentionConfig) and cache.shares_values
        shape = batch_size, mixer.num_kv_heads, mixer.head_dim
        return KVSpec(*shape, dtype, mixer.group_size, config.d_model, 0 if shared else None)

    shared = {
        tier.group: tier.shared(spec(block.mixer, cache))
        for block, cache in zip(config.blocks, caches, strict=True)
        if isinstance(cache, Cascade)
        for tier in cache.tiers
        if isinstance(tier, Lent)
    }
    return StreamState(
        layers=tuple(init(i, cache) for i, cache in enumerate(caches)),
        position=jnp.broadcast_to(position, (batch_size,)),
        seen=jnp.zeros((batch_size,), jnp.int32),
        hidden=jnp.zeros((batch_size, config.d_model), hidden_dtype),
        caches=caches,
        span=max(cache.span for cache in caches),
        shared=tuple(shared[group] for group in sorted(shared)) or None,
    ).placed()
