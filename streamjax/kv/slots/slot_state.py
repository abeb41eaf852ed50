"""`SlotState`: tokens in slots that are taken in any order, for each key head. Tiers that choose store by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

from streamjax.barriers import materialized_once, ordered_after
from streamjax.kv.codecs.slots import Slots
from streamjax.kv.codecs.slotwise import SlotwiseSlots
from streamjax.kv.query import KVTokens
from streamjax.kv.slots.ring_buffer import put_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """S slots; N is the key heads where each has tokens of its own, 1 where all have the same. In a pool of all heads
    K and P are 1, and N says whose a slot is.

    valid: which slots hold tokens. filled: slots that ever held any, the first ones. note: what is noted of each token;
    None where nothing is.
    """

    k: Slots
    v: Slots
    position: UInt32[Array, "B P S"]
    valid: Bool[Array, "B N S"]
    filled: Int32[Array, " B"]
    note: Float[Array, "B M S"] | None = None


def exchange(state: SlotState, tokens: KVTokens, slots: Int32[Array, "B N C"]) -> tuple[SlotState, KVTokens]:
    """Write token i of each row to slot `slots[b, n, i]`; return what was there."""

    def take(x: Any) -> Array:
        if isinstance(x, SlotwiseSlots):
            return x.take(slots)
        return take_slots(x, jnp.broadcast_to(slots, (*x.shape[:2], slots.shape[2])))

    held = KVTokens(
        k=take(state.k),
        v=take(state.v),
        raw_k=jnp.zeros_like(tokens.raw_k),
        position=take(state.position),
        # of every head as many are held, though not the same ones
        valid=take(state.valid)[:, :1] & tokens.valid,
        rotary=tokens.rotary,
        score=None if state.note is None or tokens.score is None else take(state.note),
    )
    _, count = tokens.run()
    held = materialized_once(held, count)
    read = (held.k, held.v) if held.score is None else (held.k, held.v, held.score)
    held = dataclasses.replace(held, outputs=tokens.outputs)
    return write(state, tokens, slots, ordered_after(count, *read)), held


def write(
    state: SlotState, tokens: KVTokens, slots: Int32[Array, "B N C"], count: Int32[Array, " B"] | None = None
) -> SlotState:
    """`exchange` where nobody asks for what was there. `count`: of the tokens, if known."""
    start, known = tokens.run()
    count, size = known if count is None else count, state.k.shape[2]
    index = jnp.arange(tokens.k.shape[2], dtype=jnp.int32) - start[:, None]
    taken = ((index >= 0) & (index < count[:, None]))[:, None]
    slots = jnp.where(taken, slots, size)  # past the end: written nowhere

    def put(buffer: Any, chunk: Array) -> Any:
        if isinstance(buffer, SlotwiseSlots):
            return buffer.put(chunk, slots)
        chunk = jnp.broadcast_to(chunk, (*buffer.shape[:2], *chunk.shape[2:]))
        return put_tokens(buffer, chunk, slots)

    newest = jnp.max(jnp.where(slots < size, slots + 1, 0), axis=(1, 2))
    return SlotState(
        k=put(state.k, tokens.k),
        v=put(state.v, tokens.v),
        position=put(state.position, tokens.position),
        valid=put(state.valid, tokens.valid),
        filled=jnp.maximum(state.filled, newest),
        note=None if state.note is None or tokens.score is None else put(state.note, tokens.score),
    )


def take_slots(x: Shaped[Array, "B N S ..."], slots: Int32[Array, "B N M"]) -> Shaped[Array, "B N M ..."]:
    """What an array with one entry a slot has in these slots."""
    return jnp.take_along_axis(x, slots.reshape(*slots.shape, *[1] * (x.ndim - 3)), axis=2, mode="clip")
