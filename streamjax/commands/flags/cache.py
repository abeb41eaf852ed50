"""`--cache`: a cascade by the name of its preset."""

from __future__ import annotations

import streamjax as sj
from streamjax.kv.presets.registry import Built

CACHE_HELP = (
    "NAME or NAME:OPTION=VALUE,OPTION=VALUE, such as streaming_llm:sinks=4,window=1020, window:window=1024 or "
    "dense:capacity=8192. Without options the cache is made to fit the length the model was trained at."
)


def parse_cache(text: str, trained_length: int, dense_capacity: int | None = None) -> Built:
    """The cascade that `--cache` describes; see `CACHE_HELP`.

    Args:
      text: name and options.
      trained_length: tokens that the model saw at once in training: where `window` is not given and the default cache
        is longer than that, the window is what fits.
      dense_capacity: of `dense`, where it is not given.

    Raises:
      ValueError: an unknown name or option, with the nearest known one; a value that is no number.
    """
    name, options = sj.kv.parse_preset(text)
    known = sj.kv.presets()[name].options
    if name == "dense" and dense_capacity is not None:
        options.setdefault("capacity", dense_capacity)
    cache = sj.kv.preset(name, **options)
    if isinstance(cache, tuple) or cache.reach is None or cache.slots <= trained_length:
        return cache
    if "window" in known and "window" not in options:
        options["window"] = max(known["window"] - (cache.slots - trained_length), 1)
        cache = sj.kv.preset(name, **options)
    return cache
