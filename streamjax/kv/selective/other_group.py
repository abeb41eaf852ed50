"""`OtherGroup`: what the other group of a stream holds, read at positions that are not of its order.

Group positions (Tong et al., 2505.16983): tokens of the source and of the output count their positions apart, so that
both can grow at once. A query then stands before keys that it may read as often as behind them: its position says how
it is rotated and nothing about what it sees. Each group has a cache of its own, and this tier is how one looks into the
other's: all that was stored there when its chunk came.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32

from pallas_kernels.partial import Partial, merge
from streamjax.field_checks import Size, check_fields
from streamjax.kv.query import KVSpec, Query, State
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.window import Window


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LentGroup:
    """What a tier is lent while its group reads: the states of the other group's tiers, and its next position [B]."""

    states: tuple[State, ...]
    position: UInt32[Array, " B"]


@dataclasses.dataclass(frozen=True)
class OtherGroup(Tier):
    """The other group's `tiers`, all of whose tokens every query sees. Keeps no token; its own state is empty.

    Args:
      tiers: `Full`, `Window` and `Sink`, as they lie in the other group's cascade.
      apart: a query stands at most so many positions from the other group's next token. Groups that grow at different
        paces would drift to distances that no model was trained on. None: at its own position, as published.

    A query sees the other group's sinks from its own position, at most `Sink.reach` behind the first one.

    Raises:
      ValueError: tiers of other kinds.
    """

    shares_values: ClassVar[bool] = True
    alters_every: ClassVar[int | None] = None

    tiers: tuple[Tier, ...]
    apart: Size | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        wrong = next((tier for tier in self.tiers if type(tier) not in (Full, Window, Sink)), None)
        if wrong is not None:
            raise ValueError(f"groups of tokens can be kept by Full, Window and Sink, not by {type(wrong).__name__}")

    @property
    def slots(self) -> int:
        return 0

    @property
    def reach_back(self) -> int | None:
        return 0

    def init(self, spec: KVSpec) -> None:
        return None

    def attend(self, state: Any, query: Query, reach: int | None) -> Partial:
        assert isinstance(state, LentGroup), "a group's state is lent by streamjax.streaming.simultaneous"
        near = query if self.apart is None else query.at_position(self._capped_positions(query, state.position))
        parts = []
        for tier, held in zip(self.tiers, state.states, strict=True):
            tokens = tier.stored(held, query.rotary)
            here = near
            if isinstance(tier, Sink) and tier.reach is not None:
                here = query.at_position(_behind_first(query, tokens.position, tier.reach))
            # Distances are no longer those of an order: all keys lie where the query does, so that it sees them.
            here = dataclasses.replace(here, position=jnp.zeros_like(query.position), back=None)
            filled = None if getattr(tier, "codec", None) is not None else held.filled
            anywhere = jnp.zeros_like(tokens.position)
            parts.append(here.attend(tokens.k, tokens.v, anywhere, tokens.valid, filled=filled))
        return merge(*parts)

    def _capped_positions(self, query: Query, there: UInt32[Array, " B"]) -> UInt32[Array, "B C"]:
        """The queries' positions, at most `apart` from the other group's next one."""
        ahead = (query.position - there[:, None]).astype(jnp.int32)
        assert self.apart is not None
        return there[:, None] + jnp.clip(ahead, -self.apart, self.apart).astype(jnp.uint32)


def _behind_first(query: Query, position: UInt32[Array, "B N S"], reach: int) -> UInt32[Array, "B C"]:
    """Where queries stand for sinks: at their own positions, at most `reach` behind the first."""
    first = position[:, 0, :1]
    distance: Int32[Array, "B C"] = (query.position - first).astype(jnp.int32)
    # Once `reach` tokens were seen it is `reach`: the counter of positions wraps, that of tokens does not.
    clamped = jnp.where(query.index < reach, jnp.minimum(distance, reach), reach)
    return first + clamped.astype(jnp.uint32)
