"""`RingState`: tokens in a ring of slots, new ones written over the oldest. Windows and pages store by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

from streamjax.barriers import materialized_once, ordered_after
from streamjax.kv.codecs.slots import CodedSlots, Slots
from streamjax.kv.query import KVTokens
from streamjax.kv.slots.over_devices import on_several_devices, read_ring_over_devices, write_ring_over_devices
from streamjax.kv.slots.ring_buffer import read_ring, write_ring


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingState:
    """A ring of slots; `cursor` is the slot that the next token takes, `filled` how many hold tokens.

    score: what is noted of the attention that each token got so far; None where nothing is. ids: of the tokens; None
    where no tier asks for them. N is 1, or the key heads where each has tokens of its own.
    """

    k: Slots
    v: Slots
    position: UInt32[Array, "B N S"]
    cursor: Int32[Array, " B"]
    filled: Int32[Array, " B"]
    score: Float[Array, "B M S"] | None = None
    ids: Int32[Array, "B 1 S"] | None = None

    @property
    def valid(self) -> Bool[Array, "B 1 S"]:
        """Which slots hold tokens, in a ring that fills from slot 0 on."""
        return jnp.arange(self.k.shape[2]) < self.filled[:, None, None]

    @property
    def held(self) -> Bool[Array, "B 1 S"]:
        """The same in a ring with more slots than tokens stay."""
        slots = self.k.shape[2]
        back = self.cursor[:, None] - 1 - jnp.arange(slots, dtype=jnp.int32)  # slots behind the newest token, or ahead
        age = jnp.where(back < 0, back + slots, back)
        return (age < self.filled[:, None])[:, None]


def push(state: RingState, tokens: KVTokens, keep: int | None = None) -> tuple[RingState, KVTokens]:
    """Write tokens over the oldest ones; return the tokens that fell out, oldest first, left-aligned.

    `keep` is how many tokens stay: as many as there are slots where None.
    """
    start, count = tokens.run()
    slots, width = state.k.shape[2], tokens.k.shape[2]
    if isinstance(state.k, CodedSlots):
        codec = state.k.codec
        most = (keep or slots) - codec.tokens - codec.waiting + 1
        if width > most:
            return _push_in_pieces(state, tokens, keep, most)
    fallen = jnp.maximum(state.filled + count - (keep or slots), 0)
    oldest = (state.cursor - state.filled) % slots

    def evict(buffer: Any, chunk: Array) -> Array:
        if isinstance(buffer, CodedSlots):
            return buffer.read_run(oldest, width)
        # The oldest `fallen` of what was stored followed by the run: stored ones first, then the run's own.
        if width <= (keep or slots):
            return read_slots(buffer, oldest, width)  # none of the run falls
        index = jnp.arange(width, dtype=jnp.int32)[None] - state.filled[:, None]
        own = jnp.clip(start[:, None] + index, 0, width - 1)
        index = jnp.where(index < 0, (state.cursor[:, None] + index) % slots, slots + own)
        both = jnp.concatenate((buffer, chunk.astype(buffer.dtype)), axis=2)
        shape = (chunk.shape[0], 1, width) + (1,) * (chunk.ndim - 3)
        return jnp.take_along_axis(both, index.reshape(shape), axis=2, mode="promise_in_bounds")

    evicted = KVTokens(
        k=evict(state.k, tokens.k),
        v=evict(state.v, tokens.v),
        raw_k=jnp.zeros_like(tokens.raw_k),
        position=evict(state.position, tokens.position),
        valid=jnp.arange(width) < fallen[:, None, None],
        rotary=tokens.rotary,
        score=None if state.score is None or tokens.score is None else evict(state.score, tokens.score),
        ids=None if state.ids is None or tokens.ids is None else evict(state.ids, tokens.ids),
    )
    # In place, though what is overwritten goes on to other tiers: read once, and before anything is written.
    evicted = materialized_once(evicted, count)
    read = (evicted.k, evicted.v) if evicted.score is None else (evicted.k, evicted.v, evicted.score)
    evicted = dataclasses.replace(evicted, outputs=tokens.outputs)
    return write(state, tokens, keep, ordered_after(count, *read)), evicted


def _push_in_pieces(state: RingState, tokens: KVTokens, keep: int | None, size: int) -> tuple[RingState, KVTokens]:
    """`push` of a few tokens at a time, so few that whatever falls out has been coded when the next ones come."""
    width = tokens.k.shape[2]
    pieces = -(-width // size)
    arrays = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens) if f.name != "rotary"}
    arrays = {name: x for name, x in arrays.items() if x is not None}

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, pieces * size - width if axis == 2 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(padded.reshape(*x.shape[:2], pieces, size, *x.shape[3:]), 2, 0)

    def one(state: RingState, some: dict[str, Array]) -> tuple[RingState, KVTokens]:
        piece: KVTokens = dataclasses.replace(tokens, **some)  # type: ignore[arg-type]
        return push(state, piece, keep)

    state, fallen = jax.lax.scan(one, state, {name: cut(x) for name, x in arrays.items()})
    # Each piece has what it lost in front: all of it to the front, in order.
    line = jnp.moveaxis(fallen.valid, 0, 2).reshape(*fallen.valid.shape[1:3], -1)
    order = jnp.argsort(~line, axis=2, stable=True)[:, :, :width]

    def joined(x: Array) -> Array:
        whole = jnp.moveaxis(x, 0, 2)
        whole = whole.reshape(*whole.shape[:2], pieces * size, *whole.shape[4:])
        index = jnp.broadcast_to(order, (*whole.shape[:2], width))
        return jnp.take_along_axis(whole, index.reshape(*index.shape, *[1] * (whole.ndim - 3)), axis=2)

    return state, jax.tree.map(joined, fallen)


def write(
    state: RingState, tokens: KVTokens, keep: int | None = None, count: Int32[Array, " B"] | None = None
) -> RingState:
    """`push` where nobody asks for what falls out, which is not read then. `count`: of the tokens, if known."""
    start, known = tokens.run()
    count, slots = known if count is None else count, state.k.shape[2]

    def put(buffer: Any, chunk: Array) -> Any:
        if isinstance(buffer, CodedSlots):
            return buffer.write(chunk, start, count)
        return write_slots(buffer, chunk, state.cursor, start, count)

    return RingState(
        put(state.k, tokens.k),
        put(state.v, tokens.v),
        put(state.position, tokens.position),
        (state.cursor + known) % slots,
        jnp.minimum(state.filled + known, keep or slots),
        None if state.score is None or tokens.score is None else put(state.score, tokens.score),
        None if state.ids is None or tokens.ids is None else put(state.ids, tokens.ids),
    )


def write_slots(
    ring: Shaped[Array, "B K S ..."],
    chunk: Shaped[Array, "B K C ..."],
    cursor: Int32[Array, " B"],
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
) -> Shaped[Array, "B K S ..."]:
    """`write_ring` along slots that may lie over several devices."""
    if on_several_devices(ring):
        return write_ring_over_devices(ring, chunk, cursor, start, count)
    return write_ring(ring, chunk, cursor, start, count, axis=2)


def read_slots(
    ring: Shaped[Array, "B K S ..."], oldest: Int32[Array, " B"], width: int
) -> Shaped[Array, "B K width ..."]:
    """`read_ring` along slots that may lie over several devices."""
    if on_several_devices(ring):
        return read_ring_over_devices(ring, oldest, width)
    return read_ring(ring, oldest, width, axis=2)
