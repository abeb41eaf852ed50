"""`Lent`: tokens of which a group of layers holds one part together, and each of its layers another part.

What is shared lies in the stream's state once (`StreamState.shared`) and is lent to each layer of the group with its
queries. `sj.compact` makes both parts of what the layers hold at that moment, and nothing changes them afterwards:
tokens that come later go to the tier behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool

from streamjax.field_checks import Count, Size, check_fields
from streamjax.kv.query import KVSpec, Query, State, Stored
from streamjax.kv.tier import Tier


@dataclasses.dataclass(frozen=True)
class Lent(Tier):
    """Tokens that were laid out over several layers. Keeps no token that comes.

    Args:
      size: tokens that were laid out, at most.
      group: which of the stream's shared parts is this layer's.
    """

    alters_every: ClassVar[int | None] = None

    size: Size
    group: Count = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def slots(self) -> int:
        return self.size

    def without_numbers(self) -> Lent:
        return dataclasses.replace(self, group=0)

    def shared(self, spec: KVSpec) -> State:
        """What a group of layers shares, empty: a dataclass with `position`, uint32 [B, 1, S], and `count`, [B]."""
        raise NotImplementedError

    def shared_and_own(self, held: Sequence[Stored], raw_k: Sequence[Array]) -> tuple[State, list[State]]:
        """What a group of layers shares of the tokens that they hold, and what each has itself.

        Args:
          held: of each layer, the same tokens in the order of the stream.
          raw_k: their keys before rotation, [B, K, S, D].
        """
        raise NotImplementedError

    def lent(self, query: Query) -> Any:
        """What the layer's group shares."""
        assert query.shared is not None, "streams that share over layers come with what they share"
        return query.shared[self.group]

    def there(self, shared: Any) -> Bool[Array, "B 1 S"]:
        """Which slots hold tokens."""
        return jnp.arange(self.size) < shared.count[:, None, None]
