"""What flows through a KV cache: a chunk's queries and tokens.

Rows of a batch are streams, each with a position and a number of new tokens of its own; chunks are padded on the right.
With two rows of 3 and 1 new tokens, `valid` is [[1, 1, 1], [1, 0, 0]].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.partial import Partial, merge
from streamjax.attention.block_cutting import even_size
from streamjax.attention.dense import attend_weighted, attention_shares, summed_over_queries
from streamjax.attention.rotary import Rotary
from streamjax.attention.token_tree import TokenTree
from streamjax.kv.codecs.slots import CodedSlots, Slots, attend_coded, mass_coded, turned

State = Any  # a pytree of arrays
Implementation = Literal["xla", "pallas"]
SLOT_BLOCK = 512  # logits of one chunk against at most this many slots exist at a time
DECODE_SLOT_BLOCK = 8192  # the same for a single token, whose logits are few
CODED_SLOT_BLOCK = 1024  # the same where slots are codes: what is decoded stays in the cache
QUERY_BLOCK = 256  # queries of a chunk that attend to the chunk at a time, to its keys up to their own end only
Fold = Callable[[Float[Array, "B K G C S"]], Float[Array, "B N S"]]


@dataclasses.dataclass(frozen=True)
class KVSpec:
    """Shapes of what a layer caches: B streams, K heads of width D, in `dtype`; `group` query heads to a key head.

    `width`: channels of the layer's input, E. `value_dim`: width of values; D where None, 0 where keys are values.
    `per_head`: the tokens come from a tier that evicts for each key head by itself, so each head has its positions.
    """

    batch_size: int
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    group: int = 1
    width: int = 0
    value_dim: int | None = None
    per_head: bool = False

    def buffer(self, slots: int) -> Float[Array, "B K S D"]:
        """Zeros for `slots` keys."""
        return jnp.zeros((self.batch_size, self.kv_heads, slots, self.head_dim), self.dtype)

    def values(self, slots: int) -> Float[Array, "B K S V"]:
        """Zeros for `slots` values."""
        width = self.head_dim if self.value_dim is None else self.value_dim
        return jnp.zeros((self.batch_size, self.kv_heads, slots, width), self.dtype)

    def positions(self, slots: int) -> UInt32[Array, "B #K S"]:
        return jnp.zeros((self.batch_size, self.kv_heads if self.per_head else 1, slots), jnp.uint32)

    def scores(self, slots: int, heads: int | None = None) -> Float[Array, "B N S"]:
        """Zeros for what is noted about each token: a number for each query head, or for each of `heads`."""
        return jnp.zeros((self.batch_size, heads or self.kv_heads * self.group, slots), jnp.float32)

    def counter(self) -> Int32[Array, " B"]:
        return jnp.zeros((self.batch_size,), jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVTokens:
    """Tokens on their way into a tier, oldest first; `valid` is one contiguous run in each row.

    k, v: rotated keys, and values, [B, K, C, D]; no channels of `v` say that keys are values. raw_k: the keys before
    rotation. position: stream position, uint32, valid: bool, both [B, 1 or K, C]: 1 while all heads of a row hold the
    same tokens. rotary: what rotated the keys.
    score: what was noted of the attention that each token has got so far (`Noting`), float32, for each of N heads; None
    where no tier asks for it. ids: what the tokens are, in the vocabulary; the same. outputs: of the layer and not of
    the tokens, what takes values to the layer's output, for each query head of a key head; the same.
    """

    k: Float[Array, "B K C D"]
    v: Float[Array, "B K C V"]
    raw_k: Float[Array, "B K C D"]
    position: UInt32[Array, "B #K C"]
    valid: Bool[Array, "B #K C"]
    rotary: Rotary | None = dataclasses.field(default=None, metadata={"static": True})
    score: Float[Array, "B N C"] | None = None
    ids: Int32[Array, "B 1 C"] | None = None
    outputs: Float[Array, "K G V E"] | None = None

    def moved(self, back: bool) -> KVTokens:
        """These tokens with their keys turned from their positions to position 0, or from there to their positions."""
        if self.rotary is None:
            return self
        position = -self.position if back else self.position
        return dataclasses.replace(self, k=self.rotary.moved(self.k, position))

    def run(self) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
        """Start and length of the run of valid tokens in each row, where all heads hold the same tokens."""
        if self.valid.shape[1] != 1:
            raise ValueError("this tier stores one list of tokens a row; it cannot follow a tier that evicts per head")
        valid, width = self.valid[:, 0], self.valid.shape[2]
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        first = jnp.min(jnp.where(valid, jnp.arange(width, dtype=jnp.int32), width), axis=1)
        return jnp.where(count > 0, first, 0), count


class Stored(NamedTuple):
    """Tokens as a tier holds them, in any order, at their true positions; `note` is of their attention, if any is."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S V"]
    position: UInt32[Array, "B #K S"]
    valid: Bool[Array, "B #K S"]
    note: Float[Array, "B N S"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvictionBlock:
    """Blocks of `every` tokens, at whose ends tiers choose what goes. A chunk that attends lies within one block.

    before: tokens of the block that came before the chunk, int32 [B]. held: tokens that the cascade holds at most.
    """

    before: Int32[Array, " B"]
    every: int = dataclasses.field(metadata={"static": True})
    held: int = dataclasses.field(metadata={"static": True})

    def place(self, width: int) -> Int32[Array, "B C"]:
        """Where each of `width` tokens stands in its block: 0, 1, ..., every - 1."""
        return self.before[:, None] + jnp.arange(width, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Query:
    """The queries of one chunk in one layer, and all that is needed to compare them with cached keys.

    q: rotated to the true position, [B, C, H, D]. raw_q: not rotated. position: uint32 [B, C], modulo 2^32. seen:
    tokens that the stream had before this chunk, int32 [B], saturating at 2^30. slopes: ALiBi, float32 [H] or None.
    valid: which queries are no padding, bool [B, C]; all where None. tables: `PageTables`, where streams have pages.
    shared: what groups of layers hold together, see `Lent`.
    differentiable: attend in a form that has a reverse mode, which computes its logits again; empty slots are visited.
    implementation: what decodes over long caches, XLA or a kernel, see `decode_kernels`; None chooses.
    sink_logits: learned logits that stand for no token, [H] or None; a cascade adds them to what its tiers gave.
    back: how many positions back each query sees at most, int32 [B, C], or [B, K, C] for each key head; None: no bound
    of its own.
    block: where the chunk stands between two moments at which tiers choose what goes; None where none chooses.
    answered: the chunk has attended before, and the mask by which it is now stored was made from what it got.
    tree: how the chunk's tokens hang together that are a tree of guesses; None: each follows the one before it. A tree
    attends and is not stored (`Deferred`).
    """

    q: Float[Array, "B C H D"]
    raw_q: Float[Array, "B C H D"]
    position: UInt32[Array, "B C"]
    seen: Int32[Array, " B"]
    slopes: Float[Array, " H"] | None
    rotary: Rotary | None = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(metadata={"static": True})
    valid: Bool[Array, "B C"] | None = None
    differentiable: bool = dataclasses.field(default=False, metadata={"static": True})
    implementation: Implementation | None = dataclasses.field(default=None, metadata={"static": True})
    sink_logits: Float[Array, " H"] | None = None
    back: Int32[Array, "B *#K C"] | None = None
    block: EvictionBlock | None = None
    tables: Any = None
    shared: Any = None
    answered: bool = dataclasses.field(default=False, metadata={"static": True})
    tree: TokenTree | None = None

    @property
    def offset(self) -> Int32[Array, "#B C"]:
        """How many tokens of the chunk stand before each query."""
        return jnp.arange(self.q.shape[1], dtype=jnp.int32)[None] if self.tree is None else self.tree.depth

    @property
    def index(self) -> Int32[Array, "B C"]:
        """Index of each query in its stream, saturating: never wraps, unlike `position`."""
        return self.seen[:, None] + self.offset

    def at_position(self, position: UInt32[Array, "B C"]) -> Query:
        """These queries as if they stood at `position`."""
        q = self.raw_q if self.rotary is None else self.rotary(self.raw_q, position)
        return dataclasses.replace(self, q=q, position=position)

    def nothing(self) -> Partial:
        """Attention to no key at all."""
        return Partial(jnp.zeros(self.q.shape, jnp.float32), jnp.full(self.q.shape[:3], -jnp.inf, jnp.float32))

    def attend(
        self,
        k: Slots,
        v: Slots,
        position: UInt32[Array, "B #K S"],
        valid: Bool[Array, "B #K S"] | Bool[Array, "B #K C S"],
        reach: int | None = None,
        filled: Int32[Array, " B"] | None = None,
        before: bool = False,
    ) -> Partial:
        """Attend causally to keys at these stream positions, at most `reach` positions back.

        `valid`: which slots hold tokens, or which of them each query may read. Distances are differences of uint32
        positions read as int32: right across the wrap of the counter. Slots are taken `SLOT_BLOCK` at a time; with
        `filled`, blocks of which no row has filled any slot are not visited, unless the query is differentiable: a loop
        without a fixed end has no reverse mode. `before`: see `visible_keys`. P is K, or 1 where one list has the keys
        of all heads, and `valid` says whose each is.
        """
        slots, single = k.shape[2], self.q.shape[1] == 1
        size, coded = min(slots, DECODE_SLOT_BLOCK if single else SLOT_BLOCK), isinstance(k, CodedSlots)
        if self.differentiable:
            filled = None
        if filled is None and not coded:
            size = even_size(slots, size)  # so the last block has few slots again that the one before it had
        if not coded and slots == size:  # a loop of one turn, with a merge in it, would be twice as much to compile
            return self._attend(k, v, position, valid, reach, before)
        nothing = self.nothing()
        used = slots if filled is None else jnp.max(filled)
        if coded:

            def part(keys: Array, v: Array, position: Array, valid: Array) -> Partial:
                return self._attend(turned(k, keys, position, self.rotary), v, position, valid, reach)

            return attend_coded(part, k, v, position, valid, nothing, used, CODED_SLOT_BLOCK if single else SLOT_BLOCK)

        def block(index: Array, part: Partial) -> Partial:
            # The last block is moved back to fit; slots that the block before it had are masked.
            start = jnp.minimum(index * size, slots - size)

            def take(x: Array, axis: int) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

            fresh = start + jnp.arange(size) >= index * size
            some = self._attend(take(k, 2), take(v, 2), take(position, 2), take(valid, -1) & fresh, reach, before)
            return merge(part, some)

        return jax.lax.fori_loop(0, (used + size - 1) // size, block, nothing)

    def attend_own(self, tokens: KVTokens, reach: int | None) -> Partial:
        """Attend causally to tokens of the queries' own chunk: query i to tokens up to i, at most `reach` back.

        Of a tree, to those above i and to i itself.
        """
        width = self.q.shape[1]
        if self.tree is not None:
            sees = tokens.valid[:, :, None] & self.tree.sees[:, None]
            return self._attend(tokens.k, tokens.v, tokens.position, sees, reach)
        parts = []
        for start in range(0, width, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, width)
            low = 0 if reach is None else max(start - reach, 0)
            queries = dataclasses.replace(
                self,
                q=self.q[:, start:stop],
                raw_q=self.raw_q[:, start:stop],
                position=self.position[:, start:stop],
                valid=None,
                back=None if self.back is None else self.back[..., start:stop],
            )
            k, v, position, valid = (x[:, :, low:stop] for x in (tokens.k, tokens.v, tokens.position, tokens.valid))
            parts.append(queries._attend(k, v, position, valid, reach))
        return Partial(*(jnp.concatenate(pieces, axis=1) for pieces in zip(*parts, strict=True)))

    def mass(
        self,
        k: Slots,
        position: UInt32[Array, "B #K S"],
        valid: Bool[Array, "B #K S"],
        lse: Float[Array, "B C H"],
        reach: int | None = None,
        filled: Int32[Array, " B"] | None = None,
        fold: Fold = summed_over_queries,
    ) -> Float[Array, "B N S"]:
        """The attention that these queries give to keys, as in `attend`, of which `lse` is the whole.

        Padding gives none. With `filled` only blocks of keys that hold any are read. `fold` makes a number for each key
        of N heads out of the shares that queries give; their sum for each query head.
        """
        slots, single = k.shape[2], self.q.shape[1] == 1
        size, coded = min(slots, DECODE_SLOT_BLOCK if single else SLOT_BLOCK), isinstance(k, CodedSlots)

        def folded(keys: Array, position: Array, valid: Array) -> Array:
            return fold(self.shares(turned(k, keys, position, self.rotary), position, valid, lse, reach))

        if not coded and slots == size and (filled is None or single):  # as `attend`: the compiler finds its logits
            return folded(k, position, valid)
        used = slots if filled is None or self.differentiable else jnp.max(filled)
        if coded:
            return mass_coded(folded, k, position, valid, used, CODED_SLOT_BLOCK if single else SLOT_BLOCK)

        def block(index: Array, masses: Array) -> Array:
            start = jnp.minimum(index * size, slots - size)  # the last block is moved back to fit
            pieces = (jax.lax.dynamic_slice_in_dim(x, start, size, 2) for x in (k, position, valid))
            return jax.lax.dynamic_update_slice_in_dim(masses, folded(*pieces).astype(masses.dtype), start, 2)

        one = jax.eval_shape(folded, *(jax.lax.slice_in_dim(x, 0, size, axis=2) for x in (k, position, valid)))
        nothing = jnp.zeros((*one.shape[:2], slots), jnp.float32)
        return jax.lax.fori_loop(0, (used + size - 1) // size, block, nothing)

    def shares(
        self,
        k: Float[Array, "B P S D"],
        position: UInt32[Array, "B #K S"],
        valid: Bool[Array, "B #K S"],
        lse: Float[Array, "B C H"],
        reach: int | None = None,
    ) -> Float[Array, "B K G C S"]:
        """How much of its attention, of which `lse` is the whole, each query gives to each key; padding gives none."""
        visible, distance = self.visible_keys(position, valid, reach)
        if self.valid is not None:
            visible &= self.valid[:, None, :, None]
        heads = max(k.shape[1], visible.shape[1])
        visible = self._by_query_head(visible, k)
        found = attention_shares(self.q, k, lse, visible, distance=distance, **self._logit_options())
        return found.reshape(found.shape[0], heads, -1, *found.shape[3:])

    def _attend(
        self, k: Array, v: Array, position: Array, valid: Array, reach: int | None, before: bool = False
    ) -> Partial:
        again = jax.checkpoint(Query._attend_all, static_argnums=(5, 6)) if self.differentiable else Query._attend_all
        return again(self, k, v, position, valid, reach, before)

    def _attend_all(
        self, k: Array, v: Array, position: Array, valid: Array, reach: int | None, before: bool
    ) -> Partial:
        return self.attend_weighted(k, v, position, valid, reach, before)[0]

    def attend_weighted(
        self, k: Array, v: Array, position: Array, valid: Array, reach: int | None, before: bool = False
    ) -> tuple[Partial, Float[Array, "B K G C S"], Float[Array, "B K G C 1"]]:
        """`attend` to all keys at once, the exponentials that it summed, and the logits above which they are."""
        v = v if v.shape[-1] else k
        visible, distance = self.visible_keys(position, valid, reach, before)
        visible = self._by_query_head(visible, k)
        return attend_weighted(self.q, k, v, visible, distance=distance, **self._logit_options())

    def _by_query_head(self, visible: Array, k: Array) -> Array:
        """What each query head sees of one list of keys, of which some are each key head's; `visible` otherwise."""
        if k.shape[1] > 1 or visible.shape[1] == 1:
            return visible
        return jnp.repeat(visible, self.q.shape[2] // visible.shape[1], axis=1)[:, None]

    def visible_keys(
        self, position: Array, valid: Array, reach: int | None, before: bool = False
    ) -> tuple[Array, Array | None]:
        """Which keys each query sees, and with ALiBi how far away they are; `before`: all keys come before all queries.

        Where nothing else depends on distances either, no query is then compared with a key.
        """
        if before and reach is None and self.back is None and self.slopes is None:
            return valid if valid.ndim == 4 else valid[:, :, None], None
        distance = (self.position[:, None, :, None] - position[:, :, None, :]).astype(jnp.int32)
        visible = (valid if valid.ndim == 4 else valid[:, :, None, :]) & (distance >= 0)
        if reach is not None:
            visible &= distance <= reach
        if self.back is not None:
            visible &= distance <= (self.back if self.back.ndim == 3 else self.back[:, None])[..., None]
        return visible, None if self.slopes is None else distance.astype(jnp.float32)

    def _logit_options(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "slopes": self.slopes}
