"""Laying a cache out anew: what one cascade holds passes through the tiers of another one, all at once.

The first tier takes what it keeps, what it leaves goes to the next, as it does token by token. A `Scored` tier makes
one choice among all that reaches it, which is the literal form of the methods that compress a prompt when it ends. What
attention decides there comes from queries that read the old cache at that moment and are not stored.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from pallas_kernels.partial import Partial, add_sink_logits, merge
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.channels.low_rank import LowRank
from streamjax.kv.head_groups import HeadGroups, in_layer_order, of_heads
from streamjax.kv.query import EvictionBlock, KVSpec, KVTokens, Query, State, Stored
from streamjax.kv.scores.score import Score
from streamjax.kv.selective.noted import Noted
from streamjax.kv.shared_front import SharedFront
from streamjax.kv.slots.slot_state import take_slots
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.sink_window import SinkWindow
from streamjax.kv.tiers.window import Window


@dataclasses.dataclass(frozen=True)
class Compaction(Cache):
    """`update` lets queries read the state of `old`, and returns what they read and the state of `new`.

    Its state is that of `old`, and what earlier queries said: `Asked`, or None where there were none. Behind these the
    new state of another layer may stand: then `Scored` tiers keep the positions that it keeps.

    Args:
      old, new: how tokens are kept before and after.
      asked: the queries are to decide; otherwise they stand for nothing, and none of them is valid.
      stored: the queries' tokens are the newest that `old` holds; otherwise they would come next.
      more: other queries follow; instead of a new state, `update` returns what all so far said.

    Raises:
      ValueError: a cascade whose tokens cannot be taken out, or that cannot take them, or one that wants queries
        where none are asked.
    """

    old: Cascade
    new: Cascade
    asked: bool
    stored: bool
    more: bool = False

    def __post_init__(self) -> None:
        for cascade in (self.old, self.new):
            if not isinstance(cascade, Cascade):
                raise ValueError(f"only cascades of tiers are compacted, not {cascade!r}")
        for tier in self.new.tiers:
            if isinstance(tier, Scored) and not self.asked and not self._knows(tier.score):
                raise ValueError(f"{tier!r} chooses by queries: give query=, such as the newest tokens of the stream")
            if isinstance(tier, Scored) and tier.score.of_tokens and not self._knows(tier.score) and not self.stored:
                raise ValueError(f"{tier!r} scores tokens that are read again: give query= with stored=True")
        self._require_shared_tokens()

    def _knows(self, score: Score) -> bool:
        """Whether the old cascade has written down what a score wants to know."""
        if score.needs_queries and not any(isinstance(t, Scored | Noted) and t.score == score for t in self.old.tiers):
            return False
        if not score.needs_attention:
            return True
        rules = [tier.wants_noted for tier in self.old.tiers]
        return score in rules and score.counts_all_queries  # others count the queries before a choice alone

    def _require_shared_tokens(self) -> None:
        """Refuse tiers with one list of tokens for all heads, where heads hold different ones that they would take."""
        chooser = next((i for i, tier in enumerate(self.old.tiers) if tier.evicts_per_head), None)
        if chooser is None:
            return
        shared = _lists(self.old.tiers[:chooser])
        following = next((i for i, tier in enumerate(self.new.tiers) if isinstance(tier, Scored)), len(self.new.tiers))
        for name, size in _lists(self.new.tiers[:following]).items():
            if size > shared[name]:
                beyond = f"beyond {name}({shared[name]})"
                raise ValueError(f"the heads hold different tokens {beyond}: {name}({size}) cannot have them all")

    @property
    def needs_outputs(self) -> bool:
        return self.new.needs_outputs

    @property
    def shares_values(self) -> bool:
        return self.old.shares_values

    def update(
        self, state: tuple[Any, ...], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple[State, ...] | Asked]:
        state, before, *leader = state
        whole = attended(self.old, state, query, tokens, self.stored)
        if self.old == self.new:
            return whole.out, Asked(None, ()) if self.more else state
        held, now = all_held(self.old, state, query, self.stored)
        rule = next(filter(None, (tier.wants_noted for tier in self.new.tiers)), None)
        note = held.note if before is None else before.note
        if rule is not None and rule.of_tokens:
            note = note if self._knows(rule) else self._said_again(rule, held, query, tokens)
        elif rule is not None and self.asked:
            width = query.q.shape[1]
            block = EvictionBlock(jnp.zeros_like(query.seen), width, self.old.slots)
            asks = dataclasses.replace(query, block=block)
            note = None if before is None else before.note
            note = rule.noted(note, asks, held.k, held.position, held.valid, whole.lse)
        held = held._replace(note=note if rule is not None else None)
        rest, spec = self._tokens(held, query, tokens)
        memories = tuple(
            self._memory(tier, state, tier.score.memory(spec) if before is None else before.memories[i], query)
            for i, tier in enumerate(tier for tier in self.new.tiers if isinstance(tier, Scored))
        )
        asked = Asked(held.note, memories)
        return whole.out, asked if self.more else self._laid_out(rest, spec, asked, query, now, *leader)

    def _said_again(self, score: Score, held: Stored, query: Query, tokens: KVTokens) -> Float[Array, "B K S"]:
        """What a score says of tokens that are read again; of others that they are worth least."""
        heads, width = held.k.shape[1], query.q.shape[1]
        spec = KVSpec(len(held.k), heads, held.k.shape[3], held.k.dtype, query.q.shape[2] // heads)
        said = score.judged(score.memory(spec), query, tokens)
        place = (held.position - query.position[:, :1, None]).astype(jnp.int32)
        place = jnp.broadcast_to(place, held.k.shape[:3])
        assert query.valid is not None
        again = (place >= leading(query.valid).astype(jnp.int32)[:, None, None]) & (place < width)
        return jnp.where(again, jnp.take_along_axis(said, jnp.clip(place, 0, width - 1), axis=2), -jnp.inf)

    def _tokens(self, held: Stored, query: Query, tokens: KVTokens) -> tuple[KVTokens, KVSpec]:
        """All that is held as tokens that fall into the new cascade, and the shapes of what it caches."""
        rows, heads, _, width = held.k.shape
        values = held.v if held.v.shape[-1] or self.new.shares_values else held.k
        group, per_head = query.q.shape[2] // heads, held.position.shape[1] > 1
        spec = KVSpec(rows, heads, width, held.k.dtype, group, value_dim=values.shape[-1], per_head=per_head)
        rest = KVTokens(
            k=held.k,
            v=values,
            raw_k=held.k if query.rotary is None else query.rotary.back(held.k, held.position),
            position=held.position,
            valid=held.valid[:, :1],  # every head holds as many
            rotary=query.rotary,
            score=held.note,
            outputs=tokens.outputs,
        )
        return rest, spec

    def _laid_out(
        self,
        rest: KVTokens,
        spec: KVSpec,
        asked: Asked,
        query: Query,
        now: UInt32[Array, " B"],
        leader: tuple[State, ...] | None = None,
    ) -> tuple[State, ...]:
        memories, per_head = iter(asked.memories), spec.per_head
        new, shared = [], per_head
        for i, tier in enumerate(self.new.tiers):
            empty = tier.init(dataclasses.replace(spec, per_head=per_head))
            if isinstance(tier, Scored):
                fill = tier.filled if leader is None else partial(tier.filled_as, leader[i])
                filled, rest = fill(empty, rest, next(memories), now)
                per_head, shared = per_head or tier.per_head, False
            else:
                empty = tier.fitted(empty, rest) if isinstance(tier, LowRank) else empty
                filled, rest = tier.absorb(empty, query, rest)
                filled, rest = (tier.store(filled, rest), rest) if tier.last_because else tier.insert(filled, rest)
            new.append(jax.tree.map(_of_all_heads, filled) if shared else filled)
        return tuple(new)

    def _memory(self, tier: Scored, state: tuple[State, ...], so_far: State, query: Query) -> State:
        """What the score knows of the stream's queries: what it knew, or what those that are asked say."""
        if not self.asked:
            for other, part in zip(self.old.tiers, state, strict=True):
                if isinstance(other, Scored | Noted) and other.score == tier.score:
                    return part.memory
        return tier.score.watched(so_far, query)


@dataclasses.dataclass(frozen=True)
class GroupedCompaction(Cache):
    """`Compaction` into heads with rules of their own: each group of `new` takes what the same heads held in `old`.

    Raises:
      ValueError: as `Compaction`; or a group whose heads are in several groups of `old`, where each has other tokens.
    """

    old: Cascade | HeadGroups
    new: HeadGroups
    asked: bool
    stored: bool
    more: bool = False

    def __post_init__(self) -> None:
        for heads, _ in self.new.groups:
            self._before(heads)

    def _before(self, heads: tuple[int, ...]) -> tuple[int | None, list[int], Cascade]:
        """Which part of the old state has these heads, where if there are several, and how it kept tokens."""
        if isinstance(self.old, Cascade):
            return None, list(heads), self.old
        for i, (theirs, cascade) in enumerate(self.old.groups):
            if set(heads) <= set(theirs):
                return i, [theirs.index(head) for head in heads], cascade
        raise ValueError(f"heads {list(heads)} lie in several groups of the old cache, and hold different tokens")

    @property
    def needs_outputs(self) -> bool:
        return any(cascade.needs_outputs for _, cascade in self.new.groups)

    def update(
        self, state: tuple[State, tuple[Asked | None, ...] | None], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple]:
        held, before = state
        if isinstance(self.old, SharedFront):
            held = self.old.apart(held)
        outs, made = [], []
        for i, (heads, cascade) in enumerate(self.new.groups):
            at, own, old = self._before(heads)
            count = self.new.heads if isinstance(self.old, Cascade) else len(self.old.groups[at or 0][0])
            part = jax.tree.map(partial(_of_some_heads, own, count), held if at is None else held[at])
            work = Compaction(old, cascade, self.asked, self.stored, self.more)
            said = None if before is None else before[i]
            out, new = work.update((part, said), *of_heads(heads, self.new.heads, query, tokens))
            outs.append(out)
            made.append(new)
        return in_layer_order([heads for heads, _ in self.new.groups], outs), tuple(made)


def _of_some_heads(heads: list[int], count: int, x: Array) -> Array:
    """An array of a state, [B, K or 1 or a multiple of K, ...] or [B], of some of its K key heads."""
    if x.ndim < 2 or x.shape[1] == 1:
        return x
    grouped = x.reshape(x.shape[0], count, -1, *x.shape[2:])
    return grouped[:, np.array(heads)].reshape(x.shape[0], -1, *x.shape[2:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
    """What queries said: the note of each token that is held, and the memory of each score."""

    note: Float[Array, "B N S"] | None
    memories: tuple[State, ...]


def attended(old: Cascade, state: tuple[State, ...], query: Query, tokens: KVTokens, stored: bool) -> Partial:
    """What queries read of a cascade and of their own chunk, whose tokens may be stored in it already."""
    parts = [tier.attend(part, query, old.reach) for tier, part in zip(old.tiers, state, strict=True)]
    if not stored:
        parts.append(query.attend_own(tokens, old.reach))
    return add_sink_logits(merge(*parts), query.sink_logits)


def all_held(old: Cascade, state: tuple[State, ...], query: Query, stored: bool) -> tuple[Stored, UInt32[Array, " B"]]:
    """All tokens that a cascade holds, oldest first, and the position of the stream's next one.

    The queries stand at the end of their chunk: the last of them is the newest token if it is stored, or follows it.
    """
    assert query.valid is not None
    now = query.position[:, -1] + 1 if stored else query.position[:, 0] + leading(query.valid)
    parts = [tier.stored(part, query.rotary) for tier, part in zip(old.tiers, state, strict=True)]
    return in_stream_order(parts, now), now


def in_stream_order(parts: list[Stored], now: UInt32[Array, " B"]) -> Stored:
    """All tokens of several tiers, oldest first, and behind them the slots that hold none.

    `now` is the position of the stream's next token. Where all heads hold the same tokens there is one order for all.
    """
    heads = max(part.position.shape[1] for part in parts)

    def joined(arrays: list[Array]) -> Array:
        wide = max(x.shape[1] for x in arrays)
        return jnp.concatenate([jnp.broadcast_to(x, (x.shape[0], wide, *x.shape[2:])) for x in arrays], axis=2)

    def mask(part: Stored) -> Bool[Array, "B N S"]:
        return jnp.broadcast_to(part.valid, (part.k.shape[0], heads, part.k.shape[2]))

    position, valid = joined([part.position for part in parts]), joined([mask(part) for part in parts])
    age = (now[:, None, None] - position).astype(jnp.int32)
    order = jnp.argsort(jnp.where(valid, -age, jnp.iinfo(jnp.int32).max), axis=2, stable=True).astype(jnp.int32)

    def sort(x: Array) -> Array:
        return take_slots(x, jnp.broadcast_to(order, (*x.shape[:2], order.shape[2])))

    k, v = (sort(joined([getattr(part, name) for part in parts])) for name in ("k", "v"))
    note = None
    if any(part.note is not None for part in parts):
        wide = next(part.note.shape[1] for part in parts if part.note is not None)
        zeros = [jnp.zeros((part.k.shape[0], wide, part.k.shape[2]), jnp.float32) for part in parts]
        note = joined([zero if part.note is None else part.note for zero, part in zip(zeros, parts, strict=True)])
        note = sort(note) if note.shape[1] % heads == 0 and heads in (1, note.shape[1]) else None
    return Stored(k, v, sort(position), sort(valid), note)


def _of_all_heads(x: Array) -> Array:
    """Positions, which alone are unsigned, once instead of for each head."""
    return x[:, :1] if x.dtype == jnp.uint32 else x


def _lists(tiers: tuple) -> dict[str, int]:
    """Tokens that are held in one list for all heads: the first and the newest ones."""
    sizes = {"Sink": 0, "Window": 0}
    for tier in tiers:
        match tier:
            case SinkWindow(sinks=sinks, window=window):
                sizes = {"Sink": sizes["Sink"] + sinks, "Window": sizes["Window"] + window}
            case Sink(size=size) | Window(size=size):
                sizes[type(tier).__name__] += size
    return sizes


def leading(valid: Bool[Array, "B C"]) -> UInt32[Array, " B"]:
    """How many queries stand for nothing in front of the others; all of them where none is valid."""
    return jnp.sum(jnp.cumsum(valid, axis=1) == 0, axis=1).astype(jnp.uint32)
