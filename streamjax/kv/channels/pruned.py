"""`PrunedKeys`: every token, and of its key the channels that queries make most of (ThinK, Xu et al., 2407.21018)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import Partial
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import Fraction, Size, check_fields
from streamjax.kv.channels.bases import WholeSlots
from streamjax.kv.codecs.codec import Codec, Codes, Role
from streamjax.kv.codecs.grouped import GroupedSlots
from streamjax.kv.codecs.slots import dense, unaltered
from streamjax.kv.query import KVSpec, KVTokens, Query, Stored
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.full import LinearState, append


@dataclasses.dataclass(frozen=True)
class Channels(Codec):
    """Of each group of `group` tokens the `kept` channels of its keys with the most energy, and whole values.

    The energy of a channel is the sum of its squares in the group's keys, times that in queries if there are any.
    """

    kept: Size
    group: Size

    @property
    def tokens(self) -> int:
        return self.group

    def check(self, head_dim: int) -> None:
        if self.kept > head_dim:
            raise ValueError(f"Channels.kept is {self.kept}, but heads have {head_dim} channels")

    def encode(self, x: Float[Array, "B K N G D"], role: Role, *tables: Array) -> Codes:
        return (x, ()) if role == "v" else self.chosen(x, jnp.ones((*x.shape[:2], x.shape[4])))

    def chosen(self, x: Float[Array, "B K N G D"], queries: Float[Array, "B K D"]) -> Codes:
        """Keys without the channels that matter least to queries of this energy, and which channels are left."""
        energy = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=3) * queries[:, :, None]
        channels = jnp.sort(jax.lax.top_k(energy, self.kept)[1], axis=-1)[:, :, :, None]
        left = jnp.take_along_axis(x, jnp.broadcast_to(channels, (*x.shape[:4], self.kept)), axis=4)
        return left, (channels.astype(jnp.uint8 if x.shape[4] <= 256 else jnp.uint16),)

    def decode(self, codes: Codes, role: Role, *tables: Array) -> Float[Array, "B K N G D"]:
        raise NotImplementedError  # `PrunedSlots` knows how many channels there were


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrunedSlots(GroupedSlots):
    """queries: the energy of each channel in the queries by which the next groups lose channels."""

    queries: Float[Array, "B K D"] | None = None

    def _packed(self, groups: Float[Array, "B K N G D"]) -> Codes:
        assert isinstance(self.codec, Channels)
        assert self.queries is not None
        return self.codec.chosen(groups, self.queries)

    def decoded(self, codes: Codes, dtype: object = None) -> Float[Array, "B K N G D"]:
        left, (channels,) = codes
        places = channels[..., None] == jnp.arange(self.shape[3], dtype=channels.dtype)  # [B, K, N, 1, c, D]
        exact = "highest" if left.dtype == jnp.float32 else None
        return jnp.einsum("bkngc,bkncd->bkngd", left, places[:, :, :, 0].astype(left.dtype), precision=exact)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrunedState:
    """energy: in the last queries of the block that is being read. clock: tokens of the stream since it began."""

    slots: LinearState
    energy: Float[Array, "B K D"]
    clock: Int32[Array, " B"]


@dataclasses.dataclass(frozen=True)
class PrunedKeys(Tier):
    """Keeps every token that reaches it, up to `capacity`; of its key only some channels. The last of its cascade.

    Groups of `group` tokens lose channels together, each key head its own: those where the sum of squares of the
    group's keys times that of queries is least. These are the last `queries` queries of the newest block of `group`
    tokens of the stream that was over before the group's last token came here; before the first block is over, keys
    alone decide. Until its group is full a token is whole; values always are.

    A stream is read in pieces that end with its blocks, so what is stored does not depend on how it is cut. A query
    sees its own chunk whole. At compaction the queries that are asked decide; without any, keys alone do.

    Args:
      capacity: tokens, whose outputs beyond it are NaN, as those of `Full` are.
      keep: share of channels that keys keep; the paper's models keep 0.6 or 0.5.
      group: tokens that lose the same channels.
      queries: that say which, at most `group`.
    """

    keeps_all: ClassVar[bool] = True
    last_because: ClassVar[str] = "nothing falls out of it"

    capacity: Size
    keep: Fraction = 0.6
    group: Size = 128
    queries: Size = 32

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep == 0:
            raise ValueError("PrunedKeys.keep is 0: it must be a number above 0, the share of channels that stay")
        if self.queries > self.group:
            raise ValueError(f"PrunedKeys.queries is {self.queries}, but a block has {self.group} of them")

    @property
    def slots(self) -> int:
        return self.capacity

    @property
    def chooses_every(self) -> int:
        return self.group

    @property
    def alters_every(self) -> int:
        return self.group

    def unaltered(self, state: PrunedState) -> Int32[Array, " B"] | int:
        return unaltered(state.slots.k)

    def init(self, spec: KVSpec) -> PrunedState:
        codec = Channels(math.ceil(round(self.keep * spec.head_dim, 6)), self.group)
        k = PrunedSlots.empty(codec, "k", spec.buffer(self.capacity))
        v = WholeSlots.empty(codec, "v", spec.values(self.capacity))
        assert isinstance(k, PrunedSlots)
        energy = jnp.zeros((spec.batch_size, spec.kv_heads, spec.head_dim), jnp.float32)
        k = dataclasses.replace(k, queries=jnp.ones_like(energy))
        return PrunedState(LinearState(k, v, spec.positions(k.shape[2]), spec.counter()), energy, spec.counter())

    def stored(self, state: PrunedState, rotary: Rotary | None) -> Stored:
        slots = state.slots
        return Stored(dense(slots.k), dense(slots.v), slots.position, slots.valid)

    def absorb(self, state: PrunedState, query: Query, tokens: KVTokens) -> tuple[PrunedState, KVTokens]:
        if query.block is None:  # a compaction, whose queries read what was held before
            assert query.valid is not None
            energy = _energy(query, query.valid, state.energy.shape[1])
            state = _with_queries(state, query.valid.any(axis=1), energy)
        return state, tokens

    def attend(self, state: PrunedState, query: Query, reach: int | None) -> Partial:
        slots = state.slots
        return query.attend(slots.k, slots.v, slots.position, slots.valid, filled=slots.filled)

    def observe(self, state: PrunedState, query: Query, lse: Float[Array, "B C H"], reach: int | None) -> PrunedState:
        assert query.block is not None, "a cascade says where blocks are to tiers that ask for them"
        asks = jnp.ones(query.q.shape[:2], bool) if query.valid is None else query.valid
        last = asks & (query.block.place(query.q.shape[1]) >= self.group - self.queries)
        energy = state.energy + _energy(query, last, state.energy.shape[1])
        return dataclasses.replace(state, energy=energy, clock=state.clock + jnp.sum(asks, axis=1, dtype=jnp.int32))

    def insert(self, state: PrunedState, tokens: KVTokens) -> tuple[PrunedState, KVTokens]:
        slots, left = append(state.slots, tokens)
        over = state.clock >= self.group
        state = _with_queries(dataclasses.replace(state, slots=slots), over, state.energy)
        energy, clock = jnp.where(over[:, None, None], 0.0, state.energy), jnp.where(over, 0, state.clock)
        return dataclasses.replace(state, energy=energy, clock=clock), left


def _energy(query: Query, asks: Bool[Array, "B C"], key_heads: int) -> Float[Array, "B K D"]:
    """The sum of squares of each channel, over some queries and over the heads that share a key head."""
    q = jax.lax.stop_gradient(rearrange(query.q, "b c (k g) d -> b c k g d", k=key_heads)).astype(jnp.float32)
    return jnp.einsum("bckgd,bc->bkd", jnp.square(q), asks.astype(jnp.float32), precision="highest")


def _with_queries(state: PrunedState, rows: Bool[Array, " B"], energy: Float[Array, "B K D"]) -> PrunedState:
    """With other queries by which the next groups of some rows lose channels."""
    k = state.slots.k
    k = dataclasses.replace(k, queries=jnp.where(rows[:, None, None], energy, k.queries))
    return dataclasses.replace(state, slots=dataclasses.replace(state.slots, k=k))
