"""What each method is here, as a cache for one context that is compacted to so many of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import streamjax as sj
from streamjax.kv.presets.registry import Built
from streamjax.kv.tiers.sink import TRUE_DISTANCE


class Sizes(NamedTuple):
    """kept: tokens of a context that stay. room: tokens of a question and its answer, of which none has to go.
    share: of the context that stays. longest: tokens of a context, a question and an answer. filters: a file of them.
    """

    kept: int
    room: int
    share: float = 0.5
    longest: int = 2048
    filters: str = ""


def qfilters(sizes: Sizes) -> tuple[sj.kv.Cascade, ...]:
    """Each layer with its filters alone, which kvpress keeps no newest tokens beside."""
    layers = sj.kv.preset("qfilters", filters=sizes.filters, window=1, size=sizes.kept, every=sizes.room)
    return tuple(sj.kv.Cascade(*cache.tiers[1:]) for cache in layers)


def criticaladakv(sizes: Sizes) -> sj.kv.Cascade:
    """CriticalKV's choice, for which the heads of a layer compete."""
    score = sj.kv.CriticalKV(sj.kv.SnapKV(32, 5))
    return sj.kv.Cascade(sj.kv.Window(32), sj.kv.Pooled(sizes.kept - 32, score, every=sizes.room))


FIRST = sj.kv.Sink(4, reach=TRUE_DISTANCE)
LAZY_THRESHOLD = 0.9  # of attention, beyond which a layer of simlayerkv is lazy
FILTERS = "qfilters.safetensors"  # in --work: what `sj.measure_filters` says of another text
METHODS: dict[str, Callable[[Sizes], Built]] = {
    "streaming_llm": lambda n: sj.kv.Cascade(FIRST, sj.kv.Window(n.kept - 4)),
    "snapkv": lambda n: sj.kv.preset("snapkv", window=32, size=n.kept - 32, kernel=5, every=n.room),
    "h2o": lambda n: sj.kv.preset("h2o", window=n.kept // 2, size=n.kept - n.kept // 2, every=n.room),
    "tova": lambda n: sj.kv.preset("tova", size=n.kept, every=n.room),
    "knorm": lambda n: sj.kv.preset("knorm", size=n.kept, every=n.room),
    "keydiff": lambda n: sj.kv.preset("keydiff", size=n.kept, every=n.room),
    "lagkv": lambda n: sj.kv.preset("lagkv", sinks=4, size=n.kept - 4, lag=32, every=n.room),
    "expected_attention": lambda n: sj.kv.preset("expected_attention", sinks=4, size=n.kept - 4, every=n.room),
    "chunkkv": lambda n: sj.kv.preset("chunkkv", window=30, size=n.kept - 30, every=-(-n.room // 10) * 10),
    "curdkv": lambda n: sj.kv.preset("curdkv", sinks=4, size=n.kept - 4, every=-(-n.room // 16) * 16),
    "leverage": lambda n: sj.kv.preset("leverage", sinks=8, window=4, size=n.kept - 12, every=n.room),
    "compactor": lambda n: sj.kv.preset("leverage", sinks=8, window=4, size=n.kept - 12, every=n.room),
    "pyramidkv": lambda n: sj.kv.preset("pyramid_kv", window=32, size=n.kept - 32, kernel=5, every=n.room),
    "adakv": lambda n: sj.kv.preset("ada_kv", window=32, size=n.kept - 32, kernel=5, every=n.room),
    "criticalkv": lambda n: sj.kv.preset("criticalkv", window=32, size=n.kept - 32, kernel=5, every=n.room),
    "criticaladakv": criticaladakv,
    "qfilters": qfilters,
    "finch": lambda n: sj.kv.preset("finch", size=n.kept, every=n.room),
    "kvzip": lambda n: sj.kv.preset("kvzip", sinks=4, size=n.kept - 4, floor=0.0, every=n.room),
    "think": lambda n: sj.kv.preset("think", keep=n.share, capacity=n.longest),
    "simlayerkv": lambda n: sj.kv.Cascade(FIRST, sj.kv.Window(n.kept - 4)),  # of its lazy layers
    "random": lambda n: sj.kv.Cascade(sj.kv.Scored(n.kept, sj.kv.RandomChoice(1), every=n.room)),
}
