"""`--cache`: a cascade by the name of its preset."""

from __future__ import annotations

import streamjax as sj
from streamjax.kv.presets.registry import Built
from streamjax.streaming.by_layer.second_mesh import goes

CACHE_HELP = (
    "NAME or NAME:OPTION=VALUE,OPTION=VALUE, such as streaming_llm:sinks=4,window=1020, window:window=1024 or "
    "dense:capacity=8192. Without options the cache is made to fit the length the model was trained at."
)


def parse_cache(text: str, trained_length: int, dense_capacity: int | None = None, *, on_mesh: bool = False) -> Built:
    """The cascade that `--cache` describes; see `CACHE_HELP`.

    Args:
      text: name and options.
      trained_length: tokens that the model saw at once in training: where `window` is not given and the default cache
        is longer than that, the window is what fits.
      dense_capacity: of `dense`, where it is not given.
      on_mesh: it is to lie on a second mesh (`--cache_mesh`), so that `attend_on`, if not given, is "mesh".

    Raises:
      ValueError: an unknown name or option, with the nearest known one; a value that is no number; a cache that
        cannot lie on a second mesh, where it has to.
    """
    name, options = sj.kv.parse_preset(text)
    known = sj.kv.presets()[name].options
    if name == "dense" and dense_capacity is not None:
        options.setdefault("capacity", dense_capacity)
    if on_mesh and "attend_on" in known:
        options.setdefault("attend_on", "mesh")
    cache = sj.kv.preset(name, **options)
    if on_mesh and not (isinstance(cache, sj.kv.Cache) and goes(cache)):
        raise ValueError(
            f"--cache={text} has no part that lies on a second mesh (--cache_mesh): take dense, or inst_infer with "
            "attend_on=mesh"
        )
    if isinstance(cache, tuple) or cache.reach is None or cache.slots <= trained_length:
        return cache
    if "window" in known and "window" not in options:
        options["window"] = max(known["window"] - (cache.slots - trained_length), 1)
        cache = sj.kv.preset(name, **options)
    return cache
