"""`Pooled`: key heads of a layer share one pool of slots, and the tokens that are worth most stay, whichever head's.

AdaKV (Feng et al., 2407.11550) gives heads whose attention is spread more tokens than those that look at few. Heads
of different sizes in arrays of one shape would take as many slots as the largest head has. Here all heads' keys lie in
one list, as in the paper's code, and a mask says whose each slot is: the bytes are those of the total, whatever head
has how many, and nothing is compiled anew. A head attends over the whole list, so the products are as many times more
as there are key heads.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from streamjax.attention.rotary import Rotary
from streamjax.field_checks import Fraction
from streamjax.kv.codecs.slots import Slots, dense
from streamjax.kv.codecs.slotwise import SlotwiseSlots
from streamjax.kv.codecs.stores import stores
from streamjax.kv.query import KVSpec, KVTokens, State, Stored
from streamjax.kv.slots.ring_buffer import put_tokens
from streamjax.kv.slots.slot_state import SlotState, take_slots
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.scored import Scored, ScoredState, lowest

PARTS = 1000  # `floor` counts in thousandths, so that sizes are whole numbers' sums


@dataclasses.dataclass(frozen=True, repr=False)
class Pooled(Scored):
    """Keeps as many tokens as all heads have together at `size` each, chosen over all heads by the score.

    Args:
      floor: the share of `size` that every head is sure of. Of n tokens that a head has among the best of all it keeps
        (1 - floor) n + floor size: 0 takes the best of all, 1 gives each head as many.
      others: as for `Scored`; `size` and `every` count tokens of each head.

    The state has K (size + every) slots, and K numbers a slot where the score notes anything.
    """

    last_because: ClassVar[str] = "its heads lose different numbers of tokens"

    floor: Fraction = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge is not None or not self.per_head:
            raise ValueError("Pooled chooses over all heads: it takes no merge rule, and per_head stays True")

    def init(self, spec: KVSpec) -> ScoredState:
        pooled = self.slots * spec.kv_heads
        one = dataclasses.replace(spec, kv_heads=1, group=spec.kv_heads * spec.group)
        position = jnp.zeros((spec.batch_size, 1, pooled), jnp.uint32)
        valid = jnp.zeros((spec.batch_size, spec.kv_heads, pooled), bool)
        k, v = stores(one.buffer(pooled), one.values(pooled), None if self.codec is None else self.codec.one_by_one())
        return self._empty(spec, k, v, position, valid, self.every * spec.kv_heads)

    def stored(self, state: ScoredState, rotary: Rotary | None) -> Stored:
        return Tier.stored(self, state, rotary)

    def store(self, state: ScoredState, tokens: KVTokens) -> ScoredState:
        tokens = self._entering(tokens)
        heads, slots = state.slots.valid.shape[1], state.slots
        (start, count), width = tokens.run(), tokens.k.shape[2]
        index = jnp.arange(width, dtype=jnp.int32) - start[:, None]
        turn = state.taken[:, None, None] + heads * index[..., None] + jnp.arange(heads, dtype=jnp.int32)
        turn = jnp.clip(turn.reshape(len(start), 1, -1), 0, heads * self.every - 1)
        there = jnp.repeat((index >= 0) & (index < count[:, None]), heads, axis=1)[:, None]
        target = jnp.where(there, jnp.take_along_axis(state.free, turn, axis=2), slots.valid.shape[2])
        whose = jnp.tile(jnp.eye(heads, dtype=bool), (1, width))  # of [K, C K] which are whose

        def listed(x: Array) -> Array:
            """Of all heads one list, token by token."""
            x = jnp.moveaxis(jnp.broadcast_to(x, (x.shape[0], heads, *x.shape[2:])), 1, 2)
            return x.reshape(x.shape[0], 1, -1, *x.shape[3:])

        note = slots.note
        if note is not None and tokens.score is not None:
            note = put_tokens(note, jnp.where(whose, listed(tokens.score), 0.0), target)
        newest = jnp.max(jnp.where(there, target + 1, 0), axis=(1, 2))
        slots = SlotState(
            k=_put(slots.k, listed(tokens.k), target),
            v=_put(slots.v, listed(tokens.v), target),
            position=put_tokens(slots.position, listed(tokens.position), target),
            valid=put_tokens(slots.valid, whose & there, target),
            filled=jnp.maximum(slots.filled, newest),
            note=note,
        )
        state = dataclasses.replace(state, slots=slots, taken=state.taken + heads * count)
        return self._chosen(state, tokens, gone=True)

    def _ranked(
        self, slots: SlotState, memory: State, now: UInt32[Array, " B"], tokens: KVTokens, whole: bool = False
    ) -> Float[Array, "B K S"]:
        """To a score each head's tokens lie in the whole list, among slots that hold none."""
        k, v = (jnp.broadcast_to(dense(x), (*slots.valid.shape, x.shape[-1])) for x in (slots.k, slots.v))
        return super()._ranked(dataclasses.replace(slots, k=k, v=v), memory, now, tokens, whole)

    def _worst(self, rank: Float[Array, "B K S"], slots: SlotState, now: UInt32[Array, " B"]) -> Int32[Array, "B 1 F"]:
        stays = chosen_over_heads(rank, slots.position, slots.valid, now, self.size, self.floor)
        return _free(slots.valid.any(axis=1), stays.any(axis=1), self.every * rank.shape[1])

    def filled(
        self, state: ScoredState, tokens: KVTokens, memory: State, now: UInt32[Array, " B"]
    ) -> tuple[ScoredState, KVTokens]:
        rows, heads = state.slots.valid.shape[:2]
        tokens, width = self._entering(tokens), tokens.k.shape[2]
        position, valid = (jnp.broadcast_to(x, (rows, heads, width)) for x in (tokens.position, tokens.valid))
        _, count = tokens.run()
        note = tokens.score if state.slots.note is not None else None
        given = SlotState(tokens.k, tokens.v, position, valid, count, note)
        rank = self._ranked(given, memory, now, tokens, whole=True)
        stays = chosen_over_heads(rank, position, valid, now, self.size, self.floor)
        at = jnp.argsort(~stays.reshape(rows, 1, -1), axis=2, stable=True)[..., : heads * self.size].astype(jnp.int32)

        def put(buffer: Slots, chunk: Array) -> Slots:
            found = take_slots(chunk.reshape(rows, 1, heads * width, *chunk.shape[3:]), at)
            return _put(buffer, found, jnp.broadcast_to(jnp.arange(at.shape[2], dtype=jnp.int32), at.shape))

        whose = at // width == jnp.arange(heads, dtype=jnp.int32)[:, None]
        mine = whose & take_slots(stays.reshape(rows, 1, -1), at)
        old = state.slots
        there = old.valid.at[:, :, : at.shape[2]].set(mine)
        if old.note is not None and note is not None:
            notes = jnp.where(whose, take_slots(note.reshape(rows, 1, -1), at), 0.0)
            old = dataclasses.replace(old, note=old.note.at[:, :, : at.shape[2]].set(notes))
        kept = SlotState(
            k=put(old.k, tokens.k),
            v=put(old.v, tokens.v),
            position=put(old.position, position),
            valid=there,
            filled=jnp.sum(there, axis=(1, 2), dtype=jnp.int32),
            note=old.note,
        )
        free = _free(there.any(axis=1), there.any(axis=1), heads * self.every)
        new = dataclasses.replace(state, slots=kept, free=free, memory=memory, now=now)
        return new, dataclasses.replace(tokens, valid=jnp.zeros_like(tokens.valid))


def chosen_over_heads(
    rank: Float[Array, "B K S"],
    position: UInt32[Array, "B #K S"],
    valid: Bool[Array, "B K S"],
    now: UInt32[Array, " B"],
    size: int,
    floor: float,
) -> Bool[Array, "B K S"]:
    """Which tokens stay, K times `size` in all: see `Pooled.floor`. All of them where there are no more."""
    rows, heads, count = rank.shape
    position = jnp.broadcast_to(position, rank.shape)

    def place(rank: Array, position: Array, valid: Array) -> Array:
        """How many tokens are worth more than each."""
        slots = rank.shape[2]
        return slots - 1 - jnp.argsort(lowest(rank, position, valid, now, slots), axis=2)

    among_all = place(*(x.reshape(rows, 1, -1) for x in (rank, position, valid))).reshape(rank.shape)
    best = jnp.sum(valid & (among_all < heads * size), axis=2)
    sure = round(floor * PARTS)
    parts = sure * size + (PARTS - sure) * best
    whole, rest = parts // PARTS, parts % PARTS
    missing = heads * size - jnp.sum(whole, axis=1, keepdims=True)
    most = whole + (jnp.argsort(jnp.argsort(-rest, axis=1, stable=True), axis=1) < missing)
    few = jnp.sum(valid, axis=(1, 2)) <= heads * size
    most = jnp.where(few[:, None], count, most)
    return valid & (place(rank, position, valid) < most[..., None])


def _put(buffer: Slots, chunk: Array, slots: Int32[Array, "B 1 C"]) -> Slots:
    """What tokens have, in these slots; nowhere where they are past the end."""
    return buffer.put(chunk, slots) if isinstance(buffer, SlotwiseSlots) else put_tokens(buffer, chunk, slots)


def _free(there: Bool[Array, "B S"], stays: Bool[Array, "B S"], count: int) -> Int32[Array, "B 1 F"]:
    """The slots that tokens may take, first those that hold none."""
    order = jnp.argsort(there.astype(jnp.int8) + stays.astype(jnp.int8), axis=1, stable=True)
    return order[:, None, :count].astype(jnp.int32)
