"""What a tier's keys and values lie in: arrays, or codes where it has a codec."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from streamjax.kv.codecs.codec import Codec, Role
from streamjax.kv.codecs.grouped import GroupedSlots
from streamjax.kv.codecs.slots import Slots
from streamjax.kv.codecs.slotwise import SlotwiseSlots


def stores(k: Float[Array, "B K S D"], v: Float[Array, "B K S V"], codec: Codec | None) -> tuple[Slots, Slots]:
    """Empty slots like these buffers of zeros; with a codec that codes groups, as many as whole groups have.

    Raises:
      ValueError: a codec that does not store heads of this width.
    """
    if codec is None:
        return k, v
    keys = _empty(codec, "k", k)
    return keys, _empty(codec, "v", v) if v.shape[3] else v  # keys are values


def _empty(codec: Codec, role: Role, zeros: Float[Array, "B K S D"]) -> Slots:
    rows, heads, _, width = zeros.shape
    codec.check(width)
    kind: type[GroupedSlots] | type[SlotwiseSlots] = SlotwiseSlots if codec.tokens == 1 else GroupedSlots
    slots, tables = kind.empty(codec.without_numbers(), role, zeros), codec.tables(role, heads, width)
    return dataclasses.replace(slots, tables=tuple(jnp.broadcast_to(x, (rows, *x.shape)) for x in tables))
