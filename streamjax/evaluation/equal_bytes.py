"""Caches of one size in bytes: what a state takes, and a preset that is as large as a number of bytes allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from streamjax.evaluation.memory import human_bytes
from streamjax.kv.presets.registry import Built, preset, presets
from streamjax.models.decoder import Decoder
from streamjax.streaming import init_state

_LEAST = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # where the smallest cache of a preset is looked for


def state_bytes(model: Decoder, cache: Built) -> int:
    """Bytes of one stream's state under a cache, by its shapes: nothing is allocated."""
    shapes = jax.eval_shape(lambda: init_state(model, cache))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def sized(
    name: str, model: Decoder, budget: float, options: Mapping[str, Any] | None = None
) -> tuple[Built, dict[str, Any]]:
    """The largest cache of a preset whose state for one stream takes at most `budget` bytes.

    Args:
      name: one of `sj.kv.presets()`.
      model: whose keys and values it holds.
      budget: bytes, of everything in the state: keys and values, and what a method notes beside them.
      options: the preset's other options; those by which it grows, `Preset.scales`, are found here.

    Returns:
      The cache, and all options that were given to the preset.

    Raises:
      ValueError: a preset that does not grow, an option in `options` by which it does, or a budget below the smallest
        cache that there is.

    Example:
      >>> cache, options = sized("streaming_llm", model, 2e6)  # doctest: +SKIP
      >>> options  # doctest: +SKIP
      {'window': 356}
    """
    given = dict(options or {})
    entry = presets()[name]
    scales = tuple(option for option in entry.scales if option not in given)
    if not scales:
        raise ValueError(f"cache {name!r} has no size left to find: leave {', '.join(entry.scales) or 'it'} open")
    usual = entry.options
    step = given.get("page", usual.get("page", 1)) if "capacity" in scales else 1

    def at(count: int) -> dict[str, Any]:
        """Options where the first one is `count` steps, and the others keep their proportion to it."""
        main = count * step
        return {**given, **{option: max(1, round(main * usual[option] / usual[scales[0]])) for option in scales}}

    def build(count: int) -> Built | None:
        try:
            return preset(name, **at(count))
        except ValueError:  # too small for its other options, or of a size that it does not take
            return None

    def takes(count: int) -> float:
        cache = build(count)
        return math.inf if cache is None else state_bytes(model, cache)

    least = next((count for count in _LEAST if build(count) is not None), None)
    if least is None:
        preset(name, **at(_LEAST[-1]))  # raises, and says why
        raise AssertionError("a preset that could not be built was built")
    if (smallest := takes(least)) > budget:
        raise ValueError(
            f"cache {name!r} takes {human_bytes(smallest)} at least with this model, and the budget is "
            f"{human_bytes(budget)}"
        )
    low, high = least, 2 * least
    while takes(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if takes(middle) <= budget else (low, middle)
    return preset(name, **at(low)), {option: at(low)[option] for option in (*given, *scales)}
