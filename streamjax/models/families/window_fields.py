"""Sliding windows of a `config.json`: one for all layers, or a list of layer types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamjax.models.config import UniformConfig
from streamjax.models.families.config_fields import Fields, by_layer

_TYPES = {"sliding_attention": True, "full_attention": False}


def read_layer_types(
    fields: Fields, num_layers: int, window: int | None, default: Sequence[bool]
) -> tuple[int | None, ...]:
    """One window a layer: `layer_types` says which layers slide; `default` does where it is absent or null."""
    types = fields.get("layer_types", list, None)
    sliding = list(default) if types is None else by_layer(types, _TYPES, num_layers)
    if any(sliding) and window is None:
        raise ValueError("field 'layer_types' has sliding layers, but 'sliding_window' is null or switched off")
    return tuple(window if s else None for s in sliding) if any(sliding) else ()


def write_layer_types(config: UniformConfig, unused: int | None = None) -> dict[str, Any]:
    """The inverse; a model with windows of several sizes does not read back, and is refused for that.

    `unused` is the window that is written where no layer has one: some architectures cannot do without.
    """
    windows = config.windows or (None,) * config.num_layers
    return {
        "sliding_window": next((w for w in windows if w is not None), unused),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }


def write_uniform(config: UniformConfig) -> dict[str, Any]:
    """`sliding_window` of an architecture whose layers all have the same one."""
    return {"sliding_window": config.windows[0] if config.windows else None}


def read_uniform(fields: Fields, num_layers: int, default: int | None) -> tuple[int | None, ...]:
    """The inverse of `write_uniform`."""
    window = fields.get("sliding_window", int, default)
    return () if window is None else (window,) * num_layers
