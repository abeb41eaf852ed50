"""What Streaming DiLoCo (2501.18512) is told: how many replicas, and when they exchange what."""

from __future__ import annotations

import dataclasses
from typing import Literal

from streamjax.field_checks import BelowOne, Count, Fraction, Positive, Size, check_fields


@dataclasses.dataclass(frozen=True)
class DiLoCoConfig:
    """Replicas of a model that train apart, each on its own rows of a batch, and exchange what they have learnt.

    The inner optimizer is the run's own. Every `sync_interval` steps each fragment of the layers has its turn: replicas
    send how far they have moved since its last turn, and the mean of that is the gradient of an outer step by
    Nesterov's momentum (2311.08105). Fragments take turns at even distances.

    Attributes:
      replicas: how many; 0 trains in the ordinary way. They lie along the mesh axis `replica`, or, where that is
        shorter, several on the same devices, one after the other. Each takes its share of `data.batch_size`.
      sync_interval: steps between two turns of a fragment.
      fragments: into how many the layers are dealt out, in turn; the last has the embedding and the output, too.
      overlap: steps between what is sent and what is made of it, in which replicas train on.
      mixing: share of its own weights that a replica keeps when a fragment comes; the others are the outer step's.
      outer_learning_rate, outer_momentum: of the outer step.
      exchange: what a number is sent in: "e3m0" are 4 bits, a sign and a power of two below the largest of its row.
    """

    replicas: Count = 0
    sync_interval: Size = 30
    fragments: Size = 2
    overlap: Count = 1
    mixing: Fraction = 0.5
    outer_learning_rate: Positive = 0.4
    outer_momentum: BelowOne = 0.9
    exchange: Literal["float32", "bfloat16", "e3m0"] = "e3m0"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.fragments > self.sync_interval:
            raise ValueError(
                f"diloco.fragments {self.fragments} is more than diloco.sync_interval {self.sync_interval}: one "
                "fragment at a step has its turn"
            )
        if self.overlap >= self.sync_interval:
            raise ValueError(
                f"diloco.overlap {self.overlap} is not below diloco.sync_interval {self.sync_interval}: a fragment "
                "would have its next turn before the last one ends"
            )

    def sent(self, step: int) -> int | None:
        """The fragment that replicas send when they have done `step` steps."""
        if step < 1:
            return None
        turns = {number * self.sync_interval // self.fragments: number for number in range(self.fragments)}
        return turns.get(step % self.sync_interval)

    def received(self, step: int) -> int | None:
        """The fragment whose outer step counts from when replicas have done `step` steps."""
        return self.sent(step - self.overlap)

    def times_sent(self, fragment: int, step: int) -> int:
        """How often a fragment was sent in the first `step` steps."""
        first = fragment * self.sync_interval // self.fragments or self.sync_interval
        return 0 if step < first else (step - first) // self.sync_interval + 1
