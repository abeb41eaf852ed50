"""`Window`: the most recent tokens, in a ring buffer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import Partial
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import LATER, Size, check_fields
from streamjax.kv.codecs.codec import Codec
from streamjax.kv.codecs.slots import dense, turned, unaltered
from streamjax.kv.codecs.stores import stores
from streamjax.kv.decode_kernels import decode, kernel_decodes
from streamjax.kv.noting import Noting
from streamjax.kv.query import KVSpec, KVTokens, Query, Stored
from streamjax.kv.slots.ring_state import RingState, push, write
from streamjax.kv.tier import Tier


@dataclasses.dataclass(frozen=True)
class Window(Tier):
    """Keeps the `size` tokens before the query: a query at position p sees keys in [p - size, p], itself included.

    `size` is StreamingLLM's `recent_size`; a model's own `sliding_window = W` is `Window(W - 1)`. Where only
    windows follow it is strict; before other tiers, tokens about to fall stay visible until their chunk is stored.

    With `observe_attention` it notes how much attention each of its tokens gets, for the tiers behind it: summed for
    each query head, or by the `Noting` that is given. A cascade asks for that by itself where a tier needs it. With
    `keep_ids` it keeps the ids of its tokens for them, likewise. With a `codec` tokens are stored as codes; what falls
    has been through it.

    Raises:
      ValueError: a window of fewer tokens than a codec leaves in full precision until a group is full.
    """

    shares_values: ClassVar[bool] = True

    size: Size
    observe_attention: bool | Noting = False
    keep_ids: bool = False
    codec: Codec | None = dataclasses.field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.codec is not None and self.size < (least := self.codec.tokens + self.codec.waiting):
            raise ValueError(f"Window.size is {self.size}, but {self.codec!r} codes no token before there are {least}")

    @property
    def _unrotated(self) -> bool:
        return self.codec is not None and self.codec.unrotated

    @property
    def slots(self) -> int:
        return self.size

    @property
    def reach_back(self) -> int | None:
        return self.size

    @property
    def noting(self) -> Noting | None:
        """How attention is noted; None where it is not."""
        if isinstance(self.observe_attention, Noting):
            return self.observe_attention
        return Noting() if self.observe_attention else None

    @property
    def alters_every(self) -> int | None:
        return None if self.codec is None else self.codec.tokens

    def unaltered(self, state: RingState) -> Int32[Array, " B"] | int:
        return unaltered(state.k)

    def room(self, state: RingState) -> Int32[Array, " B"]:
        return self.size - state.filled

    def init(self, spec: KVSpec) -> RingState:
        k, v = stores(spec.buffer(self.size), spec.values(self.size), self.codec)
        slots = k.shape[2]  # whole groups of a codec
        score = None if self.noting is None else self.noting.init(spec, slots)
        ids = spec.positions(slots).astype(jnp.int32) if self.keep_ids else None
        return RingState(k, v, spec.positions(slots), spec.counter(), spec.counter(), score, ids)

    def stored(self, state: RingState, rotary: Rotary | None) -> Stored:
        k = turned(state.k, dense(state.k), state.position, rotary)
        return Stored(k, dense(state.v), state.position, self._held(state), state.score)

    def _held(self, state: RingState) -> Bool[Array, "B 1 S"]:
        return state.valid if self.codec is None else state.held

    def _used(self, state: RingState) -> Int32[Array, " B"]:
        """Slots from the first on that may hold tokens."""
        if self.codec is None:
            return state.filled
        return jnp.where(state.filled < self.size, state.filled, state.k.shape[2])

    def attend(self, state: RingState, query: Query, reach: int | None) -> Partial:
        if kernel_decodes(query, state.k, position=state.position):
            oldest = (state.cursor - state.filled) % state.k.shape[2]
            return decode(query, state.k, state.v, state.filled, oldest, state.position)
        return query.attend(state.k, state.v, state.position, self._held(state), reach=reach, filled=self._used(state))

    def observe(self, state: RingState, query: Query, lse: Float[Array, "B C H"], reach: int | None) -> RingState:
        if self.noting is None:
            return state
        held, used = self._held(state), self._used(state)
        score = self.noting.noted(state.score, query, state.k, state.position, held, lse, reach, used)
        return dataclasses.replace(state, score=score)

    def store(self, state: RingState, tokens: KVTokens) -> RingState:
        tokens = tokens.moved(back=True) if self._unrotated else tokens
        return write(state, tokens, None if self.codec is None else self.size)

    def insert(self, state: RingState, tokens: KVTokens) -> tuple[RingState, KVTokens]:
        if not self._unrotated:
            return push(state, tokens, None if self.codec is None else self.size)
        state, fallen = push(state, tokens.moved(back=True), self.size)
        return state, fallen.moved(back=False)
