"""`LowRank`: every token, its key and its value as coordinates of low rank."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.partial import Partial
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import Fraction, Size, check_fields
from streamjax.kv.channels.bases import BasisSlots, Coordinates, WholeSlots
from streamjax.kv.codecs.codec import Role
from streamjax.kv.codecs.grouped import GroupedSlots
from streamjax.kv.codecs.slots import attend_coded, dense
from streamjax.kv.query import SLOT_BLOCK, KVSpec, KVTokens, Query, Stored
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.full import LinearState, append


@dataclasses.dataclass(frozen=True)
class Factors:
    """Directions of the keys of a layer before rotation and of its values, the best first, as bytes that hash once.

    keys, values: float32 [K D, most]. model: a fingerprint of the model that they were measured with.
    """

    keys: bytes
    values: bytes
    channels: int
    model: str

    def __repr__(self) -> str:
        return f"Factors({self.channels} channels of model {self.model})"

    def array(self, role: Role) -> Float[np.ndarray, "M R"]:
        """The directions, one a column."""
        return np.frombuffer(self.keys if role == "k" else self.values, np.float32).reshape(self.channels, -1)


@dataclasses.dataclass(frozen=True)
class LowRank(Tier):
    """Keeps every token that reaches it, up to `capacity`, as coordinates. The last tier of its cascade.

    A basis has so many directions for each head, for keys and for values; it spans the channels of all heads together.
    Keys are coordinates of what they were before rotation, and are rotated again when they are read. With `factors`
    bases are given. Without, those of a stream are what fits the first `group` tokens best that come here, and tokens
    wait in full precision until a group is full; at compaction bases fit all that is laid out. What is stored does not
    depend on how a stream is cut; a query sees its own chunk whole.

    Args:
      capacity: tokens, whose outputs beyond it are NaN, as those of `Full` are.
      keys, values: shares of channels that are left; 1 for values keeps them as they are.
      group: tokens that wait, and that make a basis.
      factors: of the layer; None where streams make their own.

    Raises:
      ValueError: a share of 0.
    """

    keeps_all: ClassVar[bool] = True
    last_because: ClassVar[str] = "nothing falls out of it"

    capacity: Size
    keys: Fraction = 0.5
    values: Fraction = 0.5
    group: Size = 512
    factors: Factors | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("keys", "values"):
            if getattr(self, name) == 0:
                raise ValueError(
                    f"{type(self).__name__}.{name} is 0: it must be a number above 0, the share that stays"
                )

    @property
    def slots(self) -> int:
        return self.capacity

    @property
    def made_for(self) -> str | None:
        return None if self.factors is None else self.factors.model

    def without_numbers(self) -> LowRank:
        return dataclasses.replace(self, factors=None)

    def init(self, spec: KVSpec) -> LinearState:
        k = self._slots(spec, "k", self.keys, spec.buffer(self.capacity))
        v = self._slots(spec, "v", self.values, spec.values(self.capacity))
        return LinearState(k, v, spec.positions(k.shape[2]), spec.counter())

    def _slots(self, spec: KVSpec, role: Role, share: float, zeros: Float[Array, "B K S D"]) -> GroupedSlots:
        """Empty slots for keys or for values.

        Raises:
          ValueError: factors of another layer, or of fewer directions than are asked for.
        """
        heads, channels = zeros.shape[1], zeros.shape[3]
        kept = max(1, round(share * channels))
        codec = Coordinates(kept, 1 if self.factors is not None else self.group)
        if kept == channels and role == "v":
            return WholeSlots.empty(codec, "v", zeros)
        slots = BasisSlots.empty(codec, role, zeros)
        assert isinstance(slots, BasisSlots)
        rows = jnp.zeros((spec.batch_size,), bool)
        if self.factors is None:
            if self.group < heads * kept:
                raise ValueError(f"{self.group} tokens (group) make no basis of {heads * kept} directions")
            return slots.with_basis(jnp.zeros((1, heads, channels, heads * kept)), rows, fits=True)
        given = self.factors.array(role)
        if len(given) != heads * channels:
            raise ValueError(f"the factors are of {len(given)} channels, and the layer caches {heads * channels}")
        if given.shape[1] < heads * kept:
            raise ValueError(f"the factors have {given.shape[1]} directions, and {heads * kept} are asked for")
        basis = given[:, : heads * kept].reshape(1, heads, channels, -1)
        return slots.with_basis(jnp.asarray(basis), ~rows, fits=False)

    def stored(self, state: LinearState, rotary: Rotary | None) -> Stored:
        k = dense(state.k)
        return Stored(k if rotary is None else rotary.moved(k, state.position), dense(state.v), state.position,
                      state.valid)  # fmt: skip

    def attend(self, state: LinearState, query: Query, reach: int | None) -> Partial:
        def part(k: Array, v: Array, position: Array, valid: Array) -> Partial:
            k = k if query.rotary is None else query.rotary.moved(k, position)
            return query.attend(k, v, position, valid)

        used = jnp.max(state.filled)
        return attend_coded(part, state.k, state.v, state.position, state.valid, query.nothing(), used, SLOT_BLOCK)

    def insert(self, state: LinearState, tokens: KVTokens) -> tuple[LinearState, KVTokens]:
        new, left = append(state, tokens.moved(back=True))
        return new, left

    def fitted(self, state: LinearState, tokens: KVTokens) -> LinearState:
        """An empty state whose bases fit all these tokens, where none are given."""
        if self.factors is not None:
            return state
        tokens, valid = tokens.moved(back=True), tokens.valid[:, 0]

        def fit(slots: GroupedSlots, x: Array) -> GroupedSlots:
            enough = jnp.sum(valid, axis=1) >= self.group
            return slots.fitted(x, valid, enough) if isinstance(slots, BasisSlots) else slots

        return dataclasses.replace(state, k=fit(state.k, tokens.k), v=fit(state.v, tokens.v))
