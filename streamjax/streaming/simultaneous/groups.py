"""Streams of two groups of tokens, source and output, each with positions of its own (Tong et al., 2505.16983).

A model that answers while it still reads has two texts that grow. If they share one count of positions, each token of
the one pushes the other's apart, or all that was written has to be read again. Here each group counts by itself: within
a group everything is as in a text alone, and an output token sees what was read of the source when it came. Source
tokens see the source alone, as published, or outputs too (`mutual`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.selective.other_group import LentGroup, OtherGroup
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.sink_window import SinkWindow
from streamjax.kv.tiers.window import Window
from streamjax.models.config import AttentionConfig, LatentAttentionConfig
from streamjax.models.decoder import Decoder
from streamjax.streaming.scan import cut, spans
from streamjax.streaming.state import StreamState, init_state, layer_caches
from streamjax.streaming.step import advance, require_room
from streamjax.streaming.token_rows import Rows, as_rows, require_ids

Group = Literal["source", "output"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedState:
    """B streams, each of two groups: the state of what was read, and of what was written. A pytree."""

    source: StreamState
    output: StreamState

    @property
    def cache_bytes(self) -> int:
        """Bytes of all arrays in the state."""
        return self.source.cache_bytes + self.output.cache_bytes

    def stream(self, group: Group) -> StreamState:
        """The state of one group.

        Raises:
          ValueError: neither "source" nor "output".
        """
        if group not in ("source", "output"):
            raise ValueError(f'group is {group!r}: it is "source" or "output"')
        return self.source if group == "source" else self.output

    def map_axes(self, fn: Callable[[Any, Sequence[str | None]], Any]) -> GroupedState:
        """A copy with `fn(array, logical names of its dimensions)` in the place of every array."""
        return GroupedState(self.source.map_axes(fn), self.output.map_axes(fn))


def init_groups(
    model: Decoder,
    source: Cache | Sequence[Cache],
    output: Cache | Sequence[Cache] | None = None,
    batch_size: int = 1,
    *,
    first_output: int = 0,
    distance: int | None = None,
    mutual: bool = False,
    dtype: DTypeLike | None = None,
) -> GroupedState:
    """The state of `batch_size` streams that have read and written nothing.

    Args:
      model: the model that will read and write.
      source: the cache of what is read: of `Full`, `Window` and `Sink`, such as "dense" and "streaming_llm".
      output: the cache of what is written; a second one like `source` where None.
      batch_size: number of independent streams.
      first_output: position of the first output token. The source begins at 0.
      distance: a token stands at most so many positions from the other group's next one (`OtherGroup.apart`); None: at
        its own position, however far that is. Streams without end should have one.
      mutual: source tokens see the output, too.
      dtype: of cached keys and values; the model's activation dtype where None.

    Raises:
      ValueError: other caches; a model with layers that do not attend, that attend within chunks, or whose positions
        are distances (ALiBi).

    Example:
      >>> groups = init_groups(model, sj.kv.preset("dense", capacity=1024), first_output=0)
      >>> groups = read_group(model, groups, prompt, "source")
      >>> groups, logits = group_step(model, groups, prompt[:, :4], "output")  # of what follows each output token
      >>> logits.shape
      (1, 4, 259)
    """
    _require_groups(model)
    pairs = [layer_caches(model.config, source), layer_caches(model.config, source if output is None else output)]
    for caches in pairs:
        wrong = next((cache for cache in caches if not isinstance(cache, Cascade)), None)
        if wrong is not None:
            raise ValueError(f"groups of tokens can be kept by Full, Window and Sink, not by {type(wrong).__name__}")
    read = [_apart(cache) for cache in pairs[0] if isinstance(cache, Cascade)]
    written = [_apart(cache) for cache in pairs[1] if isinstance(cache, Cascade)]
    reading = [_seeing(a, b, distance) for a, b in zip(read, written, strict=True)] if mutual else read
    writing = [_seeing(b, a, distance) for a, b in zip(read, written, strict=True)]
    source_state = init_state(model, reading, batch_size, dtype=dtype)
    output_state = init_state(model, writing, batch_size, position=first_output, dtype=dtype)
    span = max(source_state.span, output_state.span)  # both rotate by one rule
    return GroupedState(
        dataclasses.replace(source_state, span=span), dataclasses.replace(output_state, span=span)
    )  # fmt: skip


def _apart(cascade: Cascade) -> Cascade:
    """The same cascade with sinks and window in buffers of their own, which others can read as they lie."""
    tiers: list[Tier] = []
    for tier in cascade.tiers:
        if isinstance(tier, SinkWindow):
            tiers += [Sink(tier.sinks, tier.reach), Window(tier.window)]
        else:
            tiers.append(tier)
    return Cascade(*tiers, fuse=False)


def _seeing(own: Cascade, other: Cascade, distance: int | None = None) -> Cascade:
    """`own`, whose queries also see what `other` holds; `distance` is `OtherGroup.apart`."""
    front = [tier for tier in own.tiers if isinstance(tier, Sink)]
    tiers = tuple(tier for tier in other.tiers if not isinstance(tier, OtherGroup))
    return Cascade(*front, OtherGroup(tiers, distance), *own.tiers[len(front) :], fuse=False)


def _require_groups(model: Decoder) -> None:
    if model.config.hsa is not None:
        raise ValueError("a model with a chunk memory cannot read groups of tokens: its pages have one order")
    for i, block in enumerate(model.config.blocks):
        mixer = block.mixer
        if not isinstance(mixer, AttentionConfig | LatentAttentionConfig) or block.beside is not None:
            raise ValueError(
                f"layer {i} is recurrent: its tokens have one order, and no groups with their own positions"
            )
        if mixer.keys_of is not None:
            raise ValueError(f"layer {i} reads the keys of layer {mixer.keys_of}, which cannot be read in groups")
        if mixer.chunk is not None:
            raise ValueError(f"layer {i} attends within chunks of {mixer.chunk} tokens, which groups do not have")
        if isinstance(mixer, AttentionConfig) and mixer.alibi_slopes:
            raise ValueError(
                f"layer {i} has ALiBi: its positions are distances, which groups do not have to each other"
            )


def advance_group(
    model: Decoder,
    groups: GroupedState,
    tokens: Int[Array, "B C"],
    count: Int32[Array, " B"] | None = None,
    group: Group = "output",
    *,
    differentiable: bool = False,
) -> tuple[GroupedState, Float[Array, "B C E"]]:
    """Read a chunk of one group; return the new state and the hidden states of its tokens. For use under `jax.jit`.

    As `streamjax.advance`; the other group stays as it is.
    """
    own, other = (groups.source, groups.output) if group == "source" else (groups.output, groups.source)
    lent = dataclasses.replace(own, layers=_lent(own, other))
    new, hidden = advance(model, lent, tokens, count, differentiable=differentiable)
    new = dataclasses.replace(new, layers=_given_back(new))
    return dataclasses.replace(groups, **{group: new}), hidden


def _lent(own: StreamState, other: StreamState) -> tuple:
    """The layers' states of `own`, with what each tier reads of `other`."""

    def of_layer(i: int, cache: Cache) -> tuple:
        assert isinstance(cache, Cascade)
        lender = other.caches[i]
        assert isinstance(lender, Cascade)
        pairs = zip(other.layers[i], lender.tiers, strict=True)
        held = LentGroup(tuple(s for s, tier in pairs if not isinstance(tier, OtherGroup)), other.position)
        return tuple(
            held if isinstance(tier, OtherGroup) else state
            for state, tier in zip(own.layers[i], cache.tiers, strict=True)
        )

    return tuple(of_layer(i, cache) for i, cache in enumerate(own.caches))


def _given_back(state: StreamState) -> tuple:
    return tuple(tuple(None if isinstance(held, LentGroup) else held for held in layer) for layer in state.layers)


@partial(jax.jit, donate_argnames="groups", static_argnames="group")
def group_step(
    model: Decoder,
    groups: GroupedState,
    tokens: Int[Array, "B C"],
    group: Group = "output",
    count: Int32[Array, " B"] | None = None,
) -> tuple[GroupedState, Float[Array, "B C V"]]:
    """Read a chunk of C tokens of one group and return the logits after each, float32 [B, C, V].

    The state is donated: use the returned one. `count`: real tokens in each row; all where None. As `streamjax.step`.
    """
    groups, hidden = advance_group(model, groups, tokens, count, group)
    return groups, model.logits(hidden)


@partial(jax.jit, donate_argnames="groups", static_argnames="group")
def _read_chunk(
    model: Decoder, groups: GroupedState, tokens: Int32[Array, "B C"], count: Int32[Array, " B"], group: Group
) -> GroupedState:
    return advance_group(model, groups, tokens, count, group)[0]


def read_group(
    model: Decoder,
    groups: GroupedState,
    tokens: Rows,
    group: Group,
    chunk_size: int = 512,
    lengths: Int[Array, " B"] | np.ndarray | Sequence[int] | None = None,
) -> GroupedState:
    """Read tokens of one group; the state is donated.

    Args:
      model: the model.
      groups: from `init_groups`, or where it stands.
      tokens: ids, one row a stream.
      group: "source" or "output".
      chunk_size: tokens a step.
      lengths: real tokens in each row; all where None.

    Raises:
      ValueError: an id that the model lacks, or more tokens than a `dense` cache has room for.
    """
    array, held = as_rows(tokens, lengths)
    require_ids(array, held, model.config.vocab_size)
    require_room(groups.stream(group), held)
    for start, chunks, width in spans(int(held.max(initial=0)), chunk_size, 1):
        (piece,), (count,) = cut(array, held, start, chunks, width)
        groups = _read_chunk(model, groups, piece, count, group)
    return groups
