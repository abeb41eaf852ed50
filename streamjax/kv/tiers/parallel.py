"""`Parallel`: texts that were read side by side, sharpened and weighted as one part of attention (APE, 2502.05431)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.partial import Partial
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import Positive, Size, check_fields
from streamjax.kv.query import KVSpec, KVTokens, Query, Stored
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.full import LinearState, append


@dataclasses.dataclass(frozen=True)
class Parallel(Tier):
    """Holds `capacity` tokens that it is given once; those of the stream pass it.

    Tokens of texts that were read apart share positions, and together they draw too much attention, spread too widely.
    So their logits are divided by `temperature`, and the logarithm of their part of the softmax's denominator is
    multiplied by `temperature * scale` before it is merged with the rest.

    Args:
      capacity: tokens.
      temperature, scale: above 0; 1 and 1 is attention as it is. The paper's are below 1, found by search.
    """

    shares_values: ClassVar[bool] = True
    alters_every: ClassVar[int | None] = None

    capacity: Size
    temperature: Positive = 0.9
    scale: Positive = 0.9

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def slots(self) -> int:
        return self.capacity

    def init(self, spec: KVSpec) -> LinearState:
        return LinearState.empty(spec, self.capacity)

    def given(self, spec: KVSpec, tokens: KVTokens) -> LinearState:
        """The state that holds these tokens, at most `capacity`."""
        return append(self.init(spec), tokens)[0]

    def stored(self, state: LinearState, rotary: Rotary | None) -> Stored:
        return Stored(state.k, state.v, state.position, state.valid)

    def attend(self, state: LinearState, query: Query, reach: int | None) -> Partial:
        sharper = dataclasses.replace(query, scale=query.scale / self.temperature)
        part = sharper.attend(state.k, state.v, state.position, state.valid, filled=state.filled)
        return Partial(part.out, part.lse * (self.temperature * self.scale))
