"""KV caches: tiers, cascades of tiers, and published systems as presets."""

from streamjax.kv.boundaries import EndTokens, KeyChange
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.chunk_memory import ChunkMemory
from streamjax.kv.clusters import Clusters
from streamjax.kv.compensation import Compensation
from streamjax.kv.content_pages import ContentPages
from streamjax.kv.full import Full
from streamjax.kv.heads import HeadGroups
from streamjax.kv.indexes import Index, Mean, Middle, MinMax, Representative
from streamjax.kv.pages import Pages
from streamjax.kv.presets import Preset, parse_preset, preset, presets
from streamjax.kv.sink import Sink
from streamjax.kv.tier import KVSpec, KVTokens, Query, Tier
from streamjax.kv.window import Window

__all__ = [
    "Cache",
    "Cascade",
    "ChunkMemory",
    "Clusters",
    "Compensation",
    "ContentPages",
    "EndTokens",
    "Full",
    "HeadGroups",
    "Index",
    "KVSpec",
    "KVTokens",
    "KeyChange",
    "Mean",
    "Middle",
    "MinMax",
    "Pages",
    "Preset",
    "Query",
    "Representative",
    "Sink",
    "Tier",
    "Window",
    "parse_preset",
    "preset",
    "presets",
]
