"""What a tier's keys and values lie in: arrays, or codes where it has a codec."""

from __future__ import annotations

from jaxtyping import Array, Float

from streamjax.kv.codecs.codec import Codec
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
    codec.check(k.shape[3])
    kind: type[GroupedSlots] | type[SlotwiseSlots] = SlotwiseSlots if codec.tokens == 1 else GroupedSlots
    keys = kind.empty(codec, "k", k)
    if v.shape[3] == 0:  # keys are values
        return keys, v
    codec.check(v.shape[3])
    return keys, kind.empty(codec, "v", v)
