"""A preset that is as large as a number of bytes allows, to compare caches that cost the same."""

from __future__ import annotations

import math
from typing import Any

from streamjax.byte_units import human_bytes
from streamjax.evaluation.cache_sizes import describe
from streamjax.kv.budgets.budgeted import Budgeted
from streamjax.kv.presets.registry import Built, preset, presets
from streamjax.models.decoder import Decoder

_LEAST = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # where the smallest cache of a preset is looked for


def total_bytes(cache: Built, model: Decoder) -> int:
    """Bytes of one stream's state; a budget that will measure a prompt has the same total whatever it finds there."""
    evenly = cache.cascade if isinstance(cache, Budgeted) and cache.unmeasured else cache
    return describe(evenly, model).total


class BelowSmallest(ValueError):
    """A budget below the smallest cache of a preset, which takes so many bytes."""

    def __init__(self, message: str, smallest: float):
        super().__init__(message)
        self.smallest = smallest


def sized(name: str, model: Decoder, budget: float, **options: Any) -> Built:
    """The largest cache of a preset whose state for one stream takes at most `budget` bytes.

    >>> dense = sj.kv.describe(sj.kv.preset("dense", capacity=4096), model).total
    >>> cache = sj.kv.sized("snapkv", model, dense / 8)
    >>> sj.kv.describe(cache, model).total <= dense / 8
    True

    Args:
      name: one of `sj.kv.presets()`.
      model: whose keys and values it holds.
      budget: bytes, of everything in the state: keys and values, and what a method notes beside them.
      **options: the preset's other options; those by which it grows, `Preset.scales`, are found here.

    Raises:
      ValueError: a preset that there is not or that does not grow (`long_mem`, in a model without a side network), an
        option by which it does; `BelowSmallest`, a budget below the smallest cache that there is.
    """
    if name not in presets():
        preset(name)  # raises, and says what there is
    entry = presets()[name]
    scales, usual = tuple(option for option in entry.scales if option not in options), entry.options
    if not scales:
        raise ValueError(f"cache {name!r} has no size left to find: do not give {', '.join(entry.scales) or 'one'}")
    step = options.get("page", usual.get("page", 1)) if "capacity" in scales else 1

    def at(count: int) -> dict[str, Any]:
        """Options where the first one is `count` steps, and the others keep their proportion to it."""
        main = count * step
        return {**options, **{option: max(1, round(main * usual[option] / usual[scales[0]])) for option in scales}}

    def takes(count: int) -> float:
        try:
            return total_bytes(preset(name, **at(count)), model)
        except ValueError:  # too small for its other options, or of a size that it does not take
            return math.nan

    least = next((count for count in _LEAST if not math.isnan(takes(count))), None)
    if least is None:
        total_bytes(preset(name, **at(_LEAST[-1])), model)  # raises, and says why
        raise AssertionError("a cache that could not be made was made")
    if (smallest := takes(least)) > budget:
        raise BelowSmallest(
            f"cache {name!r} takes {human_bytes(smallest)} at least with this model, and the budget is "
            f"{human_bytes(budget)}",
            smallest,
        )
    low, high = least, 2 * least
    while takes(high) <= budget:
        low, high = high, 2 * high
    if math.isnan(takes(high)) and takes(low) == smallest:
        raise ValueError(f"cache {name!r} takes {human_bytes(smallest)} with this model, however large it is made")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if takes(middle) <= budget else (low, middle)
    return preset(name, **at(low))
