"""Rules that lay out anew what several layers hold together: pairs (MiniCache) and groups in one basis (xKV)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxtyping import Array, Float

from streamjax.field_checks import Fraction, Size, check_fields
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.channels.grouped_layers import GroupedLayers
from streamjax.kv.channels.lent import Lent
from streamjax.kv.channels.paired_layers import PairedLayers
from streamjax.kv.compaction import all_held, attended
from streamjax.kv.query import KVSpec, KVTokens, Query, State, Stored


@dataclasses.dataclass(frozen=True)
class AcrossLayers(Cache):
    """What `sj.compact` makes of the tokens of groups of layers; no stream can begin with it.

    Args:
      room: tokens that may follow; each layer keeps them as they are.
    """

    room: Size = 1024

    def __post_init__(self) -> None:
        check_fields(self)

    def groups(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        """Which of a model's layers share; the others keep all their tokens."""
        raise NotImplementedError

    def tier(self, size: int, group: int, layers: int) -> Lent:
        """How a group of so many layers, the stream's `group`-th, keeps `size` tokens."""
        raise NotImplementedError

    @property
    def slots(self) -> int:
        return self.room

    @property
    def span(self) -> int:
        return self.room

    @property
    def capacity(self) -> int | None:
        return self.room

    @property
    def reach(self) -> int | None:
        return None

    def init(self, spec: KVSpec) -> State:
        raise ValueError(
            "this cache is made of what the layers hold together: read with another one, such as dense, then sj.compact"
        )


@dataclasses.dataclass(frozen=True)
class Pairs(AcrossLayers):
    """Pairs of neighbours above `start`, a share of the layers; see `PairedLayers` for `apart` and `toward`."""

    start: Fraction = 0.5
    apart: Fraction = 0.05
    toward: Fraction = 0.6

    def groups(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        upper = list(layers)[round(self.start * len(layers)) :]
        return [tuple(upper[i : i + 2]) for i in range(0, len(upper) - 1, 2)]

    def tier(self, size: int, group: int, layers: int) -> PairedLayers:
        return PairedLayers(size, group, self.apart, self.toward)


@dataclasses.dataclass(frozen=True)
class Groups(AcrossLayers):
    """Groups of so many neighbours; see `GroupedLayers` for `keys` and `values`.

    Raises:
      ValueError: a share of 0.
    """

    layers: Size = 4
    keys: Fraction = 0.125
    values: Fraction = 0.1875

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keys", "values"):
            if getattr(self, name) == 0:
                raise ValueError(f"Groups.{name} is 0: it must be a number above 0, the share that stays")

    def groups(self, layers: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(layers[i : i + self.layers]) for i in range(0, len(layers), self.layers)]

    def tier(self, size: int, group: int, layers: int) -> GroupedLayers:
        return GroupedLayers(size, group, layers, self.keys, self.values)


@dataclasses.dataclass(frozen=True)
class AllHeld(Cache):
    """`update` returns, instead of a new state, the first `size` tokens that a cascade holds, and keys not rotated."""

    old: Cascade
    size: int

    @property
    def shares_values(self) -> bool:
        return self.old.shares_values

    def update(
        self, state: tuple[tuple[State, ...], None], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple[Stored, Float[Array, "B K S D"]]]:
        whole = attended(self.old, state[0], query, tokens, True)
        held, _ = all_held(self.old, state[0], query, True)
        k, v, position, valid = (x[:, :, : self.size] for x in (held.k, held.v, held.position, held.valid))
        raw_k = k if query.rotary is None else query.rotary.back(k, position)
        return whole.out, (Stored(k, v if v.shape[-1] else k, position, valid), raw_k)
