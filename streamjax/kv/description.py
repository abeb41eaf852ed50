"""Caches in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.channels.grouped_layers import GroupedLayers
from streamjax.kv.channels.low_rank import LowRank
from streamjax.kv.channels.paired_layers import PairedLayers
from streamjax.kv.channels.pruned import PrunedKeys
from streamjax.kv.channels.shadow import Shadow
from streamjax.kv.head_groups import HeadGroups
from streamjax.kv.layer_caches.current_chunk import CurrentChunk
from streamjax.kv.layer_caches.recurrence import BesideRecurrence, Recurrence
from streamjax.kv.presets.registry import Built
from streamjax.kv.selective.noted import Noted
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.landmark_memory import ChunkMemory
from streamjax.kv.tiers.pages import Pages
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.sink_window import SinkWindow
from streamjax.kv.tiers.window import Window


def describe_cache(cache: Built | Sequence[Cache]) -> str:
    """A cache in short, such as "Sink(4) > Window(508)"."""
    if isinstance(cache, Sequence):
        kinds = list(dict.fromkeys(map(describe_cache, cache)))
        return kinds[0] + (f" and {len(kinds) - 1} other arrangements in {len(cache)} layers" if kinds[1:] else "")
    if isinstance(cache, ChunkMemory):
        return f"ChunkMemory({cache.capacity_tokens:,})"
    if isinstance(cache, CurrentChunk):
        return f"CurrentChunk({cache.size:,})"
    if isinstance(cache, Recurrence):
        return f"Recurrence({'x'.join(map(str, cache.memory or cache.conv))})"
    if isinstance(cache, BesideRecurrence):
        return f"{describe_cache(cache.attention)} beside {describe_cache(cache.recurrence)}"
    if isinstance(cache, HeadGroups):
        return " | ".join(f"{describe_cache(cascade)} in {len(heads)} heads" for heads, cascade in cache.groups)
    if isinstance(cache, Budgeted):
        return f"{describe_cache(cache.cascade)} on the mean over layers, by {cache.budget!r}"
    if not isinstance(cache, Cascade):
        return repr(cache)
    return " > ".join(map(describe_tier, cache.tiers))


def describe_tier(tier: Tier) -> str:
    """A tier in short, such as "Window(508)"."""
    match tier:
        case SinkWindow(sinks=sinks, window=window):
            return f"Sink({sinks}) > Window({window})"
        case Sink(size=size) | Window(size=size) | Full(capacity=size):
            return f"{type(tier).__name__}({size:,}{_codec(tier)})"
        case PrunedKeys(capacity=size, keep=keep):
            return f"PrunedKeys({size:,} with {keep:g} of their channels)"
        case Shadow(capacity=size, keys=keys, page=page, top_k=top_k):
            return f"Shadow({size:,} in {page}s, top {top_k}, with {keys:g} of their keys' channels)"
        case LowRank(capacity=size, keys=keys, values=values):
            return f"LowRank({size:,} with {keys:g} of their keys' channels, {values:g} of their values')"
        case PairedLayers(size=size, apart=apart):
            return f"PairedLayers({size:,}, {apart:g} of them apart)"
        case GroupedLayers(size=size, layers=layers, keys=keys, values=values):
            shares = f"{keys:g} of their keys' channels, {values:g} of values'"
            return f"GroupedLayers({size:,} of {layers} layers with {shares})"
        case Pages(size=size, capacity=capacity, top_k=top_k):
            return f"{type(tier).__name__}({capacity:,} in {size}s, top {top_k}{_codec(tier)})"
        case Noted(capacity=size, score=score):
            return f"Noted({size:,} for {score!r})"
        case Scored(size=size, score=score, every=every, merge=merge):
            merged = "" if merge is None else f", merged by {merge!r}"
            return f"{type(tier).__name__}({size:,} by {score!r}, every {every}{merged}{_codec(tier)})"
    return repr(tier)


def _codec(tier: Tier) -> str:
    codec = getattr(tier, "codec", None)
    if codec is None:
        return ""
    fields = [(field, getattr(codec, field.name)) for field in dataclasses.fields(codec)]
    unusual = [f"{field.name}={value!r}" for field, value in fields if value != field.default]
    return f" as {type(codec).__name__}({', '.join(unusual)})"
