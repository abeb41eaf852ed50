"""What streams hold is laid out anew over several layers: the part of `compact` for `AcrossLayers`."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.channels.lent import Lent
from streamjax.kv.compaction import Compaction
from streamjax.kv.layer_caches.recurrence import Recurrence
from streamjax.kv.layouts.across_layers import AcrossLayers, AllHeld
from streamjax.kv.query import KVSpec, State
from streamjax.kv.tiers.full import Full
from streamjax.models.decoder import Decoder
from streamjax.parallel.multiprocess import on_host
from streamjax.streaming.compacting.reading_layers import through_layers
from streamjax.streaming.state import StreamState, budgeted_layers, rotated_otherwise


def compact_across(model: Decoder, state: StreamState, rule: AcrossLayers) -> StreamState:
    """The same streams, whose groups of layers share a part of the tokens that they hold; later ones stay as they are.

    Raises:
      ValueError: caches that are no cascades, or whose tokens cannot be taken out; layers of a group that differ in
        their heads or hold different tokens; a model without a group; a rotation that changes with the cache.
    """
    free, seen = budgeted_layers(model.config), int(on_host(state.seen).max())
    groups = rule.groups(free)
    grouped = {layer: number for number, group in enumerate(groups) for layer in group}
    if not groups or not seen:
        what = "no layers that could share" if not groups else "read nothing that could be shared"
        raise ValueError(f"{'the model has' if not groups else 'the streams have'} {what}")
    for group in groups:
        if len({model.config.blocks[i].mixer for i in group}) > 1:
            raise ValueError(f"layers {group[0]} to {group[-1]} differ in their heads or rotation: they cannot share")
    works: list[Cache] = []
    for i, cache in enumerate(state.caches):
        if isinstance(cache, Recurrence):
            works.append(cache)
        elif not isinstance(cache, Cascade):
            raise ValueError(f"only cascades of tiers are laid out over layers, not {cache!r}")
        elif i in grouped:
            works.append(AllHeld(cache, min(seen, cache.slots)))
        else:
            whole = Cascade(Full(min(seen, cache.slots) + rule.room))
            works.append(Compaction(cache, whole if i in free else cache, False, True))
    found = through_layers(model, state, None, True, works, [None] * len(works))
    caches = [work.new if isinstance(work, Compaction) else old for work, old in zip(works, state.caches, strict=True)]
    layers = [jax.tree.map(jnp.copy, x) if i not in grouped else None for i, x in enumerate(found)]
    shared = []
    for number, group in enumerate(groups):
        made, tier = _together([found[i] for i in group], rule, number, group)
        shared.append(made[0])
        for i, own in zip(group, made[1], strict=True):
            layers[i] = (own, _empty_full(found[i][0], rule.room))
            caches[i] = Cascade(tier, Full(rule.room))
    span = max(cache.span for cache in caches)
    if (layer := rotated_otherwise(model.config, state.span, span)) is not None:
        raise ValueError(f"layer {layer} rotates keys by what fits the cache: they cannot go to one of another span")
    kept = jax.tree.map(jnp.copy, dataclasses.replace(state, layers=()))
    new = dataclasses.replace(kept, layers=tuple(layers), caches=tuple(caches), span=span, shared=tuple(shared))
    return new.placed()


def _together(
    held: list[Any], rule: AcrossLayers, number: int, group: tuple[int, ...]
) -> tuple[tuple[State, list[State]], Lent]:
    """What a group of layers shares and what each has itself, and the tier that says how."""
    parts = [part for part, _ in held]
    for layer, part in zip(group, parts, strict=True):
        if part.position.shape[1] > 1:
            raise ValueError(f"the heads of layer {layer} hold different tokens: layers cannot share them")
        same = [np.array_equal(*pair) for pair in zip(part[2:4], parts[0][2:4], strict=True)]
        if not all(same):
            raise ValueError(f"layers {group[0]} and {layer} hold different tokens: they cannot share them")
    tier = rule.tier(parts[0].k.shape[2], number, len(group))
    return _shared_and_own(tier, parts, [raw for _, raw in held]), tier


@partial(jax.jit, static_argnums=0)
def _shared_and_own(tier: Lent, parts: list[Any], raw_k: list[Any]) -> tuple[State, list[State]]:
    return tier.shared_and_own(parts, raw_k)


def _empty_full(held: Any, room: int) -> State:
    rows, heads, _, width = held.k.shape
    return Full(room).init(KVSpec(rows, heads, width, held.k.dtype, value_dim=held.v.shape[-1]))
