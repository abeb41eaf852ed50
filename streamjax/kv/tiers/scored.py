"""`Scored`: keeps the tokens that a score ranks highest, for each key head by itself or for all together.

What falls from the tiers in front competes with what is held, and what loses falls on. Published methods that evict by
importance differ in the score alone: the attention that a token got (H2O, Scissorhands, SnapKV, TOVA), its key (KNorm,
KeyDiff), both its key and its value (LagKV), or what the queries so far make one expect (Expected Attention).

Room is made after every `every` tokens of the stream, and a chunk is read in pieces that end there. So the result is
that of reading token by token, however the stream is cut, and what is chosen costs little for each token. Nothing moves
when it is chosen: the slots of the worst tokens are those that the next tokens take.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.partial import Partial
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import LATER, Size, check_fields, described
from streamjax.kv.codecs.codec import Codec
from streamjax.kv.codecs.slots import Slots, dense, require_rotated
from streamjax.kv.codecs.slotwise import SlotwiseSlots
from streamjax.kv.codecs.stores import stores
from streamjax.kv.merging.merge import Merge, side
from streamjax.kv.noting import Noting
from streamjax.kv.query import KVSpec, KVTokens, Query, State, Stored
from streamjax.kv.scores.score import Held, Score
from streamjax.kv.slots.slot_state import SlotState, exchange, take_slots, write
from streamjax.kv.tier import Tier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredState:
    """free: the slots that the next tokens take, in this order, and `taken` how many of them have been taken.

    clock: tokens of the stream since room was made, in [0, every). memory: the score's. now: the next token's position.
    joining: the merge rule's memory.
    """

    slots: SlotState
    free: Int32[Array, "B N F"]
    taken: Int32[Array, " B"]
    clock: Int32[Array, " B"]
    now: UInt32[Array, " B"]
    memory: State
    joining: State = ()


@dataclasses.dataclass(frozen=True, repr=False)
class Scored(Tier):
    """Keeps the `size` tokens with the highest score, and up to `every` that have come since it last chose.

    Args:
      size: tokens that stay where there are more.
      score: ranks them; `H2O()`, `SnapKV(window=32)`, `KNorm()`, or one of your own (`Score`).
      per_head: each key head keeps tokens of its own; one choice for all, by the mean of their scores, where False.
      every: tokens of the stream after which it chooses. 1 is the published rule of most scores, and reads a prompt
        token by token; a prefill is the faster the more there are.
      distance: all stored tokens stand this far behind every query, see `Pages`. At their true distance where None.
      merge: what becomes of tokens that lose, in those that stay, `Gaussian()` or another `Merge`; the tier is then the
        last of its cascade. They fall to the next tier, or are gone, where None.
      codec: how tokens are stored, each by itself (`Codec.one_by_one`); as they are where None. What others have joined
        is coded again, the rest is not.

    Raises:
      ValueError: sizes that make no sense, or that the score refuses.
    """

    shares_values: ClassVar[bool] = True

    size: Size
    score: Score
    per_head: bool = True
    every: Size = 64
    distance: Size | None = None
    merge: Merge | None = dataclasses.field(default=None, metadata=LATER)
    codec: Codec | None = dataclasses.field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_fields(self)
        self.score.check(self.every)
        if self.score.at_true_distance and self.distance is not None:
            raise ValueError(f"{type(self).__name__}.distance is {self.distance}: it must be None, since "
                             f"{type(self.score).__name__} judges keys at their true places")  # fmt: skip
        if self.merge is not None:  # of this one, where the class says of all
            object.__setattr__(self, "last_because", f"{type(self.merge).__name__} merges what would fall")
        if self.codec is not None:
            require_rotated(self, self.codec.one_by_one())

    def __repr__(self) -> str:
        return described(self)

    @property
    def slots(self) -> int:
        return self.size + self.every

    @property
    def span(self) -> int:
        return self.slots if self.distance is None else 0

    @property
    def chooses_every(self) -> int:
        return self.every

    @property
    def alters_every(self) -> int | None:
        return None if self.codec is None and self.distance is None else 1

    @property
    def evicts_per_head(self) -> bool:
        return self.per_head

    @property
    def wants_noted(self) -> Noting | None:
        return self.score if self.score.needs_attention else None

    @property
    def made_for(self) -> str | None:
        return self.score.made_for or (None if self.merge is None else self.merge.made_for)

    @property
    def needs_outputs(self) -> bool:
        return self.score.needs_outputs

    @property
    def keeps_notes(self) -> bool:
        return True

    def init(self, spec: KVSpec) -> ScoredState:
        heads = spec.kv_heads if self.per_head or spec.per_head else 1
        position = jnp.zeros((spec.batch_size, heads, self.slots), jnp.uint32)
        k, v = stores(
            spec.buffer(self.slots), spec.values(self.slots), None if self.codec is None else self.codec.one_by_one()
        )
        return self._empty(spec, k, v, position, jnp.zeros(position.shape, bool), self.every)

    def _empty(
        self,
        spec: KVSpec,
        k: Slots,
        v: Slots,
        position: UInt32[Array, "B N S"],
        valid: Bool[Array, "B _ S"],
        free: int,
    ) -> ScoredState:
        """A state in which nothing is held, and the first `free` slots are those that tokens take."""
        noted = self.score.needs_attention or self.score.remembers
        return ScoredState(
            slots=SlotState(
                k=k,
                v=v,
                position=position,
                valid=valid,
                filled=spec.counter(),
                note=self.score.init(spec, position.shape[2]) if noted else None,
            ),
            free=jnp.broadcast_to(jnp.arange(free, dtype=jnp.int32), (*position.shape[:2], free)),
            taken=spec.counter(),
            clock=spec.counter(),
            now=spec.counter().astype(jnp.uint32),
            memory=self.score.memory(spec),
            joining=() if self.merge is None else self.merge.memory(spec),
        )

    def without_numbers(self) -> Scored:
        score, merge = self.score.without_numbers(), None if self.merge is None else self.merge.without_numbers()
        same = score == self.score and merge == self.merge
        return self if same else dataclasses.replace(self, score=score, merge=merge)

    def absorb(self, state: ScoredState, query: Query, tokens: KVTokens) -> tuple[ScoredState, KVTokens]:
        """Says of tokens that come what the score makes of them alone, where it does."""
        if self.score.of_tokens:
            tokens = dataclasses.replace(tokens, score=self.score.judged(state.memory, query, tokens))
        return state, tokens

    def _placed(self, query: Query) -> Query:
        """The queries as they stand towards the stored tokens."""
        return query if self.distance is None else query.at_position(jnp.full_like(query.position, self.distance))

    def _positions(self, slots: SlotState) -> UInt32[Array, "B N S"]:
        return slots.position if self.distance is None else jnp.zeros_like(slots.position)

    def stored(self, state: ScoredState, rotary: Rotary | None) -> Stored:
        slots, k = state.slots, dense(state.slots.k)
        if self.distance is not None and rotary is not None:
            k = rotary.moved(k, slots.position)
        note = slots.note if self.score.needs_attention else None
        return Stored(k, dense(slots.v), slots.position, slots.valid, note)

    def attend(self, state: ScoredState, query: Query, reach: int | None) -> Partial:
        slots = state.slots
        return self._placed(query).attend(slots.k, slots.v, self._positions(slots), slots.valid, filled=slots.filled)

    def observe(self, state: ScoredState, query: Query, lse: Float[Array, "B C H"], reach: int | None) -> ScoredState:
        slots, asks = state.slots, jnp.ones(query.q.shape[:2], bool) if query.valid is None else query.valid
        if self.score.needs_attention:
            note = self.score.noted(
                slots.note, self._placed(query), slots.k, self._positions(slots), slots.valid, lse, filled=slots.filled
            )
            slots = dataclasses.replace(slots, note=note)
        count = jnp.sum(asks, axis=1, dtype=jnp.int32)
        return dataclasses.replace(
            state,
            slots=slots,
            clock=state.clock + count,
            now=jnp.where(count > 0, query.position[:, 0] + count.astype(jnp.uint32), state.now),
            memory=jax.lax.stop_gradient(self.score.watched(state.memory, query)),
        )

    def insert(self, state: ScoredState, tokens: KVTokens) -> tuple[ScoredState, KVTokens]:
        """Store tokens; those whose slots they take fall out. Until then what was not chosen stays visible."""
        tokens = self._entering(tokens)
        slots, fallen = exchange(state.slots, tokens, self._targets(state, tokens))
        fallen = fallen if self.distance is None else fallen.moved(back=False)
        if self.score.remembers:
            fallen = dataclasses.replace(fallen, score=None)
        return self._chosen(self._moved_on(state, slots, tokens), tokens, gone=False), fallen

    def store(self, state: ScoredState, tokens: KVTokens) -> ScoredState:
        tokens = self._entering(tokens)
        slots = write(state.slots, tokens, self._targets(state, tokens))
        return self._chosen(self._moved_on(state, slots, tokens), tokens, gone=True)

    def _entering(self, tokens: KVTokens) -> KVTokens:
        """Tokens as they are stored: at a fixed distance their keys lie at position 0."""
        if self.distance is not None:
            tokens = tokens.moved(back=True)
        if self.score.remembers:
            new = jnp.zeros((*tokens.k.shape[:3],), jnp.float32)
            tokens = dataclasses.replace(tokens, score=new)
        return tokens

    def _targets(self, state: ScoredState, tokens: KVTokens) -> Int32[Array, "B N C"]:
        """The slot that each token takes; anything for padding."""
        start, _ = tokens.run()
        turn = state.taken[:, None] + jnp.arange(tokens.k.shape[2], dtype=jnp.int32) - start[:, None]
        turn = jnp.clip(turn, 0, self.every - 1)[:, None]
        return jnp.take_along_axis(state.free, jnp.broadcast_to(turn, (*state.free.shape[:2], turn.shape[2])), axis=2)

    def _moved_on(self, state: ScoredState, slots: SlotState, tokens: KVTokens) -> ScoredState:
        _, count = tokens.run()
        return dataclasses.replace(state, slots=slots, taken=state.taken + count)

    def _chosen(self, state: ScoredState, tokens: KVTokens, gone: bool) -> ScoredState:
        """Where a block of `every` tokens is over: choose the slots that the next block's tokens take."""
        due = state.clock >= self.every

        def choose(slots: SlotState) -> tuple[Array, Array, Array | None, tuple]:
            # Fused with the write, this read would make the CPU compiler copy the whole buffer.
            slots = jax.lax.optimization_barrier(slots)
            rank = self._ranked(jax.lax.stop_gradient(slots), state.memory, state.now, tokens)
            worst = self._worst(rank, slots, state.now)
            here = due[:, None, None]
            note = None if slots.note is None or not self.score.remembers else jnp.where(here, rank, slots.note)
            gone_from = jnp.broadcast_to(worst, (*slots.valid.shape[:2], worst.shape[2]))
            left = jax.vmap(jax.vmap(lambda valid, at: valid.at[at].set(False)))(slots.valid, gone_from)
            merged: tuple = ()
            if self.merge is not None:
                every = jnp.broadcast_to(jnp.arange(rank.shape[2], dtype=jnp.int32), rank.shape)
                plain = dataclasses.replace(slots, k=dense(slots.k), v=dense(slots.v))
                stays = side(dataclasses.replace(plain, valid=left), rank, every)
                k, v, joining = self.merge.merged(stays, side(plain, rank, worst), state.joining, tokens.rotary)
                merged = _rewritten(slots.k, stays.k, k), _rewritten(slots.v, stays.v, v), joining
                merged = jax.tree.map(partial(_of_rows, due), merged, (slots.k, slots.v, state.joining))
            return jnp.where(here, worst, state.free), jnp.where(here & gone, left, slots.valid), note, merged

        def wait(slots: SlotState) -> tuple[Array, Array, Array | None, tuple]:
            merged = () if self.merge is None else (slots.k, slots.v, state.joining)
            return state.free, slots.valid, slots.note if self.score.remembers else None, merged

        slots = state.slots if self.merge is not None else jax.lax.stop_gradient(state.slots)
        free, valid, note, merged = jax.lax.cond(due.any(), choose, wait, slots)
        k, v, joining = merged or (state.slots.k, state.slots.v, state.joining)
        note = note if self.score.remembers else state.slots.note
        none = jnp.zeros_like(state.clock)
        return dataclasses.replace(
            state,
            slots=dataclasses.replace(state.slots, k=k, v=v, valid=valid, note=note),
            free=free,
            taken=jnp.where(due, none, state.taken),
            clock=jnp.where(due, none, state.clock),
            joining=joining,
        )

    def _worst(self, rank: Float[Array, "B N S"], slots: SlotState, now: UInt32[Array, " B"]) -> Int32[Array, "B N F"]:
        """The slots that the next block's tokens take."""
        return lowest(rank, slots.position, slots.valid, now, self.every)

    def _ranked(
        self, slots: SlotState, memory: State, now: UInt32[Array, " B"], tokens: KVTokens, whole: bool = False
    ) -> Float[Array, "B N S"]:
        """The score of each slot's token, one for all heads where they choose together; `tokens` are of the layer."""
        held = Held(
            dense(slots.k), dense(slots.v), slots.position, slots.valid, slots.note, memory, now, tokens.rotary,
            self.distance, self.size, tokens.outputs,
        )  # fmt: skip
        rank = self.score.rank_all(held) if whole else self.score.rank(held)
        return rank if slots.valid.shape[1] > 1 or rank.shape[1] == 1 else jnp.mean(rank, axis=1, keepdims=True)

    def filled(
        self, state: ScoredState, tokens: KVTokens, memory: State, now: UInt32[Array, " B"]
    ) -> tuple[ScoredState, KVTokens]:
        """An empty state with the best of all these tokens, in one choice, and the tokens that it leaves.

        Args:
          tokens: in the order of the stream, those that are valid first.
          memory: the score's.
          now: the position of the stream's next token.
        """
        tokens, given = self._all_entering(state, tokens)
        return self._split(state, tokens, given, self._ranked(given, memory, now, tokens, whole=True), memory, now)

    def filled_as(
        self, leader: ScoredState, state: ScoredState, tokens: KVTokens, memory: State, now: UInt32[Array, " B"]
    ) -> tuple[ScoredState, KVTokens]:
        """As `filled`, with the positions that another layer's state keeps, which had the same tokens to choose of."""
        tokens, given = self._all_entering(state, tokens)
        kept = _are_kept(given.position, leader.slots, now).astype(jnp.float32)
        return self._split(state, tokens, given, kept, memory, now)

    def _all_entering(self, state: ScoredState, tokens: KVTokens) -> tuple[KVTokens, SlotState]:
        """Tokens as they are cached here, and the same as slots."""
        tokens = self._entering(tokens)
        shape = (*state.slots.valid.shape[:2], tokens.valid.shape[2])
        position, valid = (jnp.broadcast_to(x, shape) for x in (tokens.position, tokens.valid))
        _, count = tokens.run()
        note = tokens.score if state.slots.note is not None else None
        return tokens, SlotState(tokens.k, tokens.v, position, valid, count, note)

    def _split(
        self,
        state: ScoredState,
        tokens: KVTokens,
        given: SlotState,
        rank: Float[Array, "B N S"],
        memory: State,
        now: UInt32[Array, " B"],
    ) -> tuple[ScoredState, KVTokens]:
        """The state with the highest ranks of all these tokens, and the others."""
        position, valid, note = given.position, given.valid, given.note
        worst_first = lowest(rank, position, valid, now, rank.shape[2])
        split = max(rank.shape[2] - self.size, 0)
        falls, stays = (jnp.sort(x, axis=2) for x in (worst_first[..., :split], worst_first[..., split:]))

        k, v, joining = _at_slots(given.k, stays), _at_slots(given.v, stays), state.joining
        if self.merge is not None:
            both = side(given, rank, stays), side(given, rank, falls)
            k, v, joining = self.merge.merged(*both, joining, tokens.rotary)

        def put(buffer: Any, found: Array) -> Any:
            found = jnp.broadcast_to(found, (*buffer.shape[:2], *found.shape[2:]))
            if isinstance(buffer, SlotwiseSlots):
                return buffer.put(found, jnp.arange(found.shape[2], dtype=jnp.int32)[None, None].repeat(len(found), 0))
            return buffer.at[:, :, : found.shape[2]].set(found.astype(buffer.dtype))

        slots = SlotState(
            k=put(state.slots.k, k),
            v=put(state.slots.v, v),
            position=put(state.slots.position, _at_slots(position, stays)),
            valid=put(state.slots.valid, _at_slots(valid, stays)),
            filled=jnp.minimum(given.filled, self.size),
            note=None if state.slots.note is None or note is None else put(state.slots.note, _at_slots(note, stays)),
        )
        # slots that hold nothing are as many as are needed, and come first
        free = lowest(jnp.zeros(slots.valid.shape, jnp.float32), slots.position, slots.valid, now, self.every)
        new = dataclasses.replace(state, slots=slots, free=free, memory=memory, now=now, joining=joining)

        k, v, raw_k = (_at_slots(x, falls) for x in (tokens.k, tokens.v, tokens.raw_k))
        score = None if self.score.remembers or tokens.score is None else _at_slots(tokens.score, falls)
        places, there = _at_slots(position, falls), _at_slots(valid, falls)[:, :1]
        rest = dataclasses.replace(tokens, k=k, v=v, raw_k=raw_k, position=places, valid=there, score=score)
        return new, rest if self.distance is None else rest.moved(back=False)


def _are_kept(position: UInt32[Array, "B N S"], slots: SlotState, now: UInt32[Array, " B"]) -> Bool[Array, "B N S"]:
    """Which positions are among those of the slots."""
    age, held = ((now[:, None, None] - x).astype(jnp.int32) for x in (position, slots.position))
    held = jnp.sort(jnp.where(slots.valid, held, jnp.iinfo(jnp.int32).max), axis=2)
    at = jax.vmap(jax.vmap(jnp.searchsorted))(held, age).clip(max=held.shape[2] - 1)
    return jnp.take_along_axis(held, at, axis=2) == age


def _at_slots(x: Array, at: Int32[Array, "B N M"]) -> Array:
    return take_slots(x, jnp.broadcast_to(at, (*x.shape[:2], at.shape[2])))


def _rewritten(buffer: Slots, before: Float[Array, "B K S D"], now: Float[Array, "B K S D"]) -> Slots:
    """The slots with what they hold now, of which codes are made only where that is not what they held."""
    if not isinstance(buffer, SlotwiseSlots):
        return now
    slot = jnp.arange(now.shape[2], dtype=jnp.int32)
    return buffer.put(now, jnp.where((now != before).any(axis=3), slot, now.shape[2]))


def _of_rows(due: Bool[Array, " B"], new: Array, old: Array) -> Array:
    """The new values in the rows that are due."""
    return jnp.where(due.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def lowest(
    rank: Float[Array, "B N S"],
    position: UInt32[Array, "B N S"],
    valid: Bool[Array, "B N S"],
    now: UInt32[Array, " B"],
    count: int,
) -> Int32[Array, "B N count"]:
    """The `count` slots that are worth least, in order: first those that hold nothing, then by rank and by age."""
    age = (now[:, None, None] - position).astype(jnp.int32)
    rank = jnp.where(valid & ~jnp.isnan(rank), rank, -jnp.inf)
    newness = jnp.where(valid, -age, jnp.iinfo(jnp.int32).min)
    slot = jnp.broadcast_to(jnp.arange(rank.shape[2], dtype=jnp.int32), rank.shape)
    return jax.lax.sort((rank, newness, slot), num_keys=2, is_stable=True)[2][..., :count]
