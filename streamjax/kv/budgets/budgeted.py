"""`Budgeted`: one cascade for all layers, in which each layer's `Scored` tier has the size that a budget gives it."""

from __future__ import annotations

import dataclasses

from streamjax.field_checks import Count, Size, check_fields
from streamjax.kv.budgets.budget import Budget, scored_tier
from streamjax.kv.budgets.calibration import Calibration
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.query import KVSpec, State


@dataclasses.dataclass(frozen=True)
class Budgeted(Cache):
    """A rule for all layers, from which `sj.init_state` and `sj.compact` make a cascade for each.

    Args:
      cascade: what a layer keeps; the total is the size of its `Scored` tier times the number of layers.
      budget: how the total is divided.
      calibration: what the budget has measured of the model, where it measures; in `sj.compact` the prompt says it.
      multiple: of which sizes are multiples: layers of equal sizes share their compiled programs, and prompts whose
        sizes come from one short list do, too.
      distinct: how many different sizes there are at most; 0: one a layer.
      most: tokens that a layer can make use of, where that is known.

    Raises:
      ValueError: a cascade without a `Scored` tier, or a calibration by another budget.
    """

    cascade: Cascade
    budget: Budget
    calibration: Calibration | None = None
    multiple: Size = 1
    distinct: Count = 0
    most: Size | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        scored_tier(self.cascade)
        if self.calibration is not None and self.calibration.budget != self.budget.measured_by:
            by = f"{self.budget.measured_by} needs one of its own"
            raise ValueError(f"this calibration is by {self.calibration.budget}; {by}: sj.measure_budget(...)")

    @property
    def unmeasured(self) -> bool:
        """Whether it can be a stream's cache only when its budget has measured the model."""
        return self.budget.measures and self.calibration is None

    def for_layers(self, layers: int) -> tuple[Cascade, ...]:
        """The cascades of so many layers.

        Raises:
          ValueError: a budget that measures and has not; a calibration of another number of layers; a total that is too
            small.
        """
        table = None if self.calibration is None or not self.budget.measures else self.calibration.numbers
        if table is not None and len(table) != layers:
            raise ValueError(f"this calibration is of {len(table)} layers, and the model has {layers} that keep tokens")
        total = scored_tier(self.cascade).size * layers
        sizes = self.budget.sizes(total, layers, table, self.most, self.multiple, self.distinct)
        return tuple(self.budget.layer(self.cascade, size) for size in sizes)

    @property
    def slots(self) -> int:
        return self.cascade.slots

    @property
    def span(self) -> int:
        return self.cascade.span

    @property
    def capacity(self) -> int | None:
        return self.cascade.capacity

    @property
    def reach(self) -> int | None:
        return self.cascade.reach

    @property
    def needs_ids(self) -> bool:
        return self.cascade.needs_ids

    def init(self, spec: KVSpec) -> State:
        raise ValueError("a budget is divided over the layers of a model: sj.init_state and sj.compact do so")


def few_sizes(size: int, levels: int) -> tuple[int, int]:
    """`multiple` and `distinct` of a `Budgeted` that measures prompts: an eighth of the mean, so that prompts whose
    layers weigh differently still take their sizes from one short list; with `levels=0` every layer has its own.

    Example:
      >>> few_sizes(928, levels=4), few_sizes(928, levels=0)
      ((116, 4), (1, 0))
    """
    return (max(size // 8, 1) if levels else 1, levels)
