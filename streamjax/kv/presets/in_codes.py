"""Any named cache with its tokens in few bits: `sj.kv.preset("snapkv", codec="int4")`.

What a cache keeps and how many bits a number takes are chosen apart: every preset whose tiers can hold codes takes
`codec=`, on the command line too ("snapkv:size=928,codec=int4").
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.codecs.codec import Codec
from streamjax.kv.codecs.fp8 import FP8
from streamjax.kv.codecs.hadamard import Hadamard
from streamjax.kv.codecs.integers import Int
from streamjax.kv.head_groups import HeadGroups
from streamjax.kv.shared_front import SharedFront
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.pages import Pages
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.sink_window import SinkWindow
from streamjax.kv.tiers.window import Window

CODECS: dict[str, Codec] = {
    "fp8": FP8(),
    "int8": Int(8),
    "int4": Int(4, fit="error"),
    "int2": Int(2, group=32, fit="error"),
    "hadamard4": Hadamard(Int(4, fit="error")),
    "hadamard2": Hadamard(Int(2, group=32, fit="error")),
}


def in_codes(cache: Cache, codec: Codec) -> Cache:
    """The cache with a codec in every tier that has none and can hold codes.

    Sinks stay in full precision, and so do windows that are shorter than a group of the codec: the newest tokens. Pages
    shorter than a group have groups of their own length.

    Raises:
      ValueError: no tier that can, or one that does not take this codec.
    """
    if isinstance(cache, Budgeted):
        return dataclasses.replace(cache, cascade=_cascade(cache.cascade, codec))
    coded: Cache = cache
    if isinstance(cache, HeadGroups):
        groups = [(heads, _cascade(cascade, codec)) for heads, cascade in cache.groups]
        coded = SharedFront(cache.front, *groups) if isinstance(cache, SharedFront) else HeadGroups(*groups)
    elif isinstance(cache, Cascade):
        coded = _cascade(cache, codec)
    if coded == cache:
        raise ValueError(f"{type(cache).__name__} has no tier that would hold tokens as codes of {codec!r}")
    return coded


def _cascade(cascade: Cascade, codec: Codec) -> Cascade:
    return Cascade(*(coded for tier in cascade.tiers for coded in _of_tier(tier, codec)))


def _of_tier(tier: Any, codec: Codec) -> tuple[Tier, ...]:
    if isinstance(tier, SinkWindow):
        window, *_ = _of_tier(Window(tier.window), codec)
        return Sink(tier.sinks, tier.reach), window
    if getattr(tier, "codec", codec) is not None:  # has one, or can have none
        return (tier,)
    if isinstance(tier, Window) and tier.size < codec.tokens + codec.waiting:
        return (tier,)
    if isinstance(tier, Pages) and isinstance(codec, Int):
        codec = dataclasses.replace(codec, group=math.gcd(tier.size, codec.group))
    return (dataclasses.replace(tier, codec=codec),)
