"""The learning rate of what is trained beside a frozen model."""

from __future__ import annotations

import optax


def warmup_cosine(highest: float, steps: int, risen: int = 10) -> optax.Schedule:
    """A rate that rises from 0 for one in `risen` of the steps, one step at least, and falls to 0 along a cosine."""
    warmup = max(steps // risen, 1)
    return optax.warmup_cosine_decay_schedule(0.0, highest, warmup, max(steps, warmup + 1))
