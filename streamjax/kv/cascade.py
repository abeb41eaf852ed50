"""A KV cache as a cascade of tiers: what one tier evicts falls to the next, what the last evicts is gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import Partial, add_sink_logits, merge
from streamjax.barriers import ordered_after
from streamjax.kv.cache import Cache, least
from streamjax.kv.channels.lent import Lent
from streamjax.kv.channels.low_rank import LowRank
from streamjax.kv.eviction_blocks import read_in_blocks
from streamjax.kv.noted_attention import QUERIES, attend_and_note
from streamjax.kv.noting import Noting
from streamjax.kv.query import QUERY_BLOCK, KVSpec, KVTokens, Query, State, Stored
from streamjax.kv.selective.noted import Noted
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.pages import Pages
from streamjax.kv.tiers.scored import Scored
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.sink_window import SinkWindow
from streamjax.kv.tiers.window import Window


@dataclasses.dataclass(frozen=True, init=False)
class Cascade(Cache):
    """Tiers in the order in which a token passes them. Static and hashable; `init` makes the state.

    `Cascade(Sink(4), Window(1020))` is StreamingLLM. With `fuse=True` adjacent tiers that can share one buffer do; the
    results are the same, decoding reads one contiguous store.
    """

    tiers: tuple[Tier, ...]

    def __init__(self, *tiers: Tier, fuse: bool = True):
        if not tiers:
            raise ValueError("a Cascade needs at least one tier, for instance sj.kv.Window(1020)")
        for tier in tiers:
            if not isinstance(tier, Tier):
                raise ValueError(f"a Cascade is made of tiers such as sj.kv.Window(1020), not {tier!r}")
        if any(isinstance(tier, Sink) for tier in tiers[1:]):
            raise ValueError("Sink must be the first tier of a Cascade: it keeps the first tokens of the stream")
        for tier in tiers[:-1]:
            if tier.last_because:
                raise ValueError(f"{type(tier).__name__} must be the last tier of a Cascade: {tier.last_because}")
        reach = sum(tier.slots for tier in tiers)
        placed = [dataclasses.replace(t, reach=reach) if isinstance(t, Sink) and t.reach is None else t for t in tiers]
        match placed:
            case [Sink() as sink, Window(codec=None) as window] if fuse:
                placed = [SinkWindow(sink.size, window.size, reach if sink.reach is None else sink.reach)]
        if any(tier.wants_noted for tier in placed):
            placed = _noting(placed)
        if any(tier.needs_ids for tier in placed):
            placed = [dataclasses.replace(t, keep_ids=True) if isinstance(t, Window) else t for t in placed]
        every = sorted({tier.chooses_every for tier in placed if tier.chooses_every is not None})
        if len(every) > 1:
            raise ValueError(f"the tiers of a Cascade choose at the same tokens; every is {every}")
        object.__setattr__(self, "tiers", tuple(placed))

    @property
    def slots(self) -> int:
        return sum(tier.slots for tier in self.tiers)

    @property
    def span(self) -> int:
        return self.capacity or sum(tier.span for tier in self.tiers) + 1

    @property
    def capacity(self) -> int | None:
        return self.slots if self.tiers[-1].keeps_all else None

    @property
    def reach(self) -> int | None:
        """How far back a query sees, sinks apart: the windows' sizes together. None: all that the chunk brought."""
        reaches = [tier.reach_back for tier in self.tiers]
        return None if None in reaches else sum(reach or 0 for reach in reaches)

    @property
    def needs_ids(self) -> bool:
        return any(tier.needs_ids for tier in self.tiers)

    @property
    def made_for(self) -> str | None:
        return next(filter(None, map(_made_for, self.tiers)), None)

    @property
    def needs_outputs(self) -> bool:
        return any(tier.needs_outputs for tier in self.tiers)

    @property
    def shares_values(self) -> bool:
        return all(tier.shares_values for tier in self.tiers)

    @property
    def borrows(self) -> int | None:
        """Which of `StreamState.shared` its layer reads; None where it shares nothing with others."""
        return next((tier.group for tier in self.tiers if isinstance(tier, Lent)), None)

    def renumbered(self) -> tuple[Cascade, None]:
        tiers = list(map(_without_numbers, self.tiers))
        return (self if tiers == list(self.tiers) else Cascade(*tiers, fuse=False)), None

    def init(self, spec: KVSpec) -> tuple[State, ...]:
        states = []
        for tier in self.tiers:
            states.append(tier.init(spec))
            if tier.evicts_per_head:
                spec = dataclasses.replace(spec, per_head=True)
        return tuple(states)

    def update(
        self, state: tuple[State, ...], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple[State, ...]]:
        chooser = self._chooser
        if query.tree is not None:
            return self._whole(state, query, tokens).out, state
        if chooser is not None:
            every = self.tiers[chooser].chooses_every
            assert every is not None

            def clock(state: tuple[State, ...]) -> Int32[Array, " B"]:
                return state[chooser].clock

            return read_in_blocks(self._update_whole, clock, every, self.slots, state, query, tokens)
        return self._update_whole(state, query, tokens)

    @property
    def _chooser(self) -> int | None:
        """The first of the tiers that choose what goes after so many tokens."""
        return next((i for i, tier in enumerate(self.tiers) if tier.chooses_every is not None), None)

    @property
    def alters_every(self) -> int | None:
        return min((tier.alters_every for tier in self.tiers if tier.alters_every is not None), default=None)

    @property
    def notes_attention(self) -> bool:
        return any(tier.wants_noted for tier in self.tiers)

    def unaltered(self, state: tuple[State, ...]) -> Int32[Array, " B"] | int:
        """A token sees what those before it in its chunk have changed: one more than may come before a change."""
        found: list[Int32[Array, " B"] | int] = []
        before: Int32[Array, " B"] | int = 0
        for tier, part in zip(self.tiers, state, strict=True):
            if tier.alters_every is not None:
                found.append(before + tier.unaltered(part) + 1)
            before = before + tier.room(part)
        return 1 if (some := least(found)) is None else some

    def levels(self, state: tuple[State, ...]) -> Int32[Array, " B"] | int | None:
        most = [super().levels(state), None if self.reach is None else self.reach + 1]
        if self._chooser is not None:
            every = self.tiers[self._chooser].chooses_every
            assert every is not None
            most.append(every - state[self._chooser].clock)
        return least(most)

    def _update_whole(
        self, state: tuple[State, ...], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple[State, ...]]:
        whole, _, new = self._update(state, query, tokens)
        return whole.out, new

    def leaves_chunk(self, width: int) -> bool:
        """Whether attention to a chunk of so many tokens itself can be computed elsewhere, see `update_stored`.

        Not where tiers note attention or choose by it, nor where a query of the last block sees so few positions back
        that keys of the chunk are left out, which needs the cascade's own reach.
        """
        asks = self._chooser is not None or any(tier.wants_noted is not None or tier.watches for tier in self.tiers)
        return not asks and (self.reach is None or self.reach >= (width - 1) // QUERY_BLOCK * QUERY_BLOCK)

    def update_stored(
        self, state: tuple[State, ...], query: Query, tokens: KVTokens
    ) -> tuple[Partial, Bool[Array, "B #K C"], tuple[State, ...]]:
        """`update` without attention to the chunk itself, for a cascade that `leaves_chunk`.

        Returns:
          Attention to what is stored, to be merged with attention to those tokens of the chunk that no tier has
          absorbed, at most `reach` positions back, and with the sinks' logits; which tokens these are; the new state.
        """
        return self._update(state, query, tokens, own=False)

    def attend_stored(self, state: tuple[State, ...], query: Query) -> Partial:
        """Attention to what is stored; nothing is stored in addition."""
        return self._whole(state, query, None, own=False)

    def _whole(self, state: Sequence[State], query: Query, rest: KVTokens | None, own: bool = True) -> Partial:
        """Attention to all tiers, and to those tokens of the chunk that none has absorbed."""
        parts = [tier.attend(part, query, self.reach) for tier, part in zip(self.tiers, state, strict=True)]
        if not own or rest is None:
            return merge(*parts)
        parts.append(query.attend_own(rest, self.reach))
        return add_sink_logits(merge(*parts), query.sink_logits)

    def _notes_while_reading(self, query: Query) -> int | None:
        """Which tier notes attention from the logits by which a chunk attends; None where they are computed again."""
        many = query.q.shape[1] > QUERIES and not query.differentiable and query.tree is None
        if isinstance(self.tiers[-1], Noted):
            noting = self.tiers[-1].wants_noted
            alone = len(self.tiers) == 1 and noting is not None and noting.sums_attention
            return 0 if many and alone else None
        found = [i for i, tier in enumerate(self.tiers) if isinstance(tier, Window) and tier.noting is not None]
        if not many or len(found) != 1 or not isinstance(self.tiers[-1], Pages):
            return None
        window = self.tiers[found[0]]
        assert isinstance(window, Window)
        return found[0] if type(window.noting) is Noting and window.codec is None else None

    def _read_and_note(
        self, joint: int, state: list[State], query: Query, rest: KVTokens
    ) -> tuple[State, KVTokens, Partial]:
        """The window's state and the chunk's tokens with what was noted of the chunk's attention, and all of that."""
        tiers = [(tier, part) for i, (tier, part) in enumerate(zip(self.tiers, state, strict=True)) if i != joint]
        others = merge(query.nothing(), *(tier.attend(part, query, self.reach) for tier, part in tiers))
        others = add_sink_logits(others, query.sink_logits)
        noted = self.tiers[joint]
        window = state[joint].slots if isinstance(noted, Noted) else state[joint]
        stored = Stored(window.k, window.v, window.position, window.valid)
        whole, more, own = attend_and_note(query, stored, rest, others, self.reach, window.filled)
        if not isinstance(noted, Noted):
            return dataclasses.replace(window, score=window.score + more), dataclasses.replace(rest, score=own), whole
        heads = state[joint].note.shape[1]  # query heads that share a key head vote together
        more, own = (jnp.sum(x.reshape(len(x), heads, -1, x.shape[2]), axis=2) for x in (more, own))
        new = noted.watched(dataclasses.replace(state[joint], note=state[joint].note + more), query)
        return new, dataclasses.replace(rest, score=own), whole

    def _update(
        self, state: tuple[State, ...], query: Query, tokens: KVTokens, own: bool = True
    ) -> tuple[Partial, Bool[Array, "B #K C"], tuple[State, ...]]:
        """See `update_stored`; with attention to the chunk's `own` tokens, which is then the whole."""
        new = list(state)
        rest = tokens
        for i, tier in enumerate(self.tiers):
            new[i], rest = tier.absorb(new[i], query, rest)
        last, written = self.tiers[-1], None
        if isinstance(last, Pages) and last.stores_first(new[-1], query):
            falling = rest
            for part, tier in zip(new[:-1], self.tiers[:-1], strict=True):
                falling = tier.insert(part, falling)[1]
            written = last.store(new[-1], falling)
            new[-1] = last.with_written(new[-1], written)
        noting = next(filter(None, (tier.wants_noted for tier in self.tiers)), None)
        joint, left = self._notes_while_reading(query), rest.valid
        if joint is None:
            whole = self._whole(new, query, rest, own)
        else:
            observed, rest, whole = self._read_and_note(joint, new, query, rest)
        noted: list[Array] = []
        if joint is None and noting is not None and not noting.of_tokens:
            score = noting.noted(None, query, rest.k, rest.position, rest.valid, whole.lse, self.reach)
            rest = dataclasses.replace(rest, score=score)
        told = noting is not None or query.block is not None or any(tier.watches for tier in self.tiers)
        if told:
            before = new
            new = [
                observed if i == joint else tier.observe(part, query, whole.lse, self.reach)
                for i, (tier, part) in enumerate(zip(self.tiers, new, strict=True))
            ]
            pairs = zip(jax.tree.leaves(before), jax.tree.leaves(new), strict=True)
            noted = [b for a, b in pairs if a is not b and jnp.issubdtype(b.dtype, jnp.floating)]
        if not query.answered or told:
            rest = dataclasses.replace(rest, valid=ordered_after(rest.valid, whole.out, *noted))
        for i, tier in enumerate(self.tiers[:-1]):
            new[i], rest = tier.insert(new[i], rest)
        new[-1] = last.store(new[-1], rest)
        if isinstance(last, Pages) and written is not None:
            new[-1] = last.with_written(new[-1], written)
        return whole, left, tuple(new)


def _made_for(tier: Tier) -> str | None:
    codec = getattr(tier, "codec", None)
    return tier.made_for if codec is None else tier.made_for or codec.made_for


def _without_numbers(tier: Any) -> Tier:
    """The tier without what was measured of a layer, which is data: it lies in the state."""
    if isinstance(tier, LowRank | Scored | Lent):
        tier = tier.without_numbers()
    codec = getattr(tier, "codec", None)
    return tier if codec is None or codec.made_for is None else dataclasses.replace(tier, codec=codec.without_numbers())


def _noting(tiers: list[Tier]) -> list[Tier]:
    """The tiers, of which those in front of the last that wants attention noted do so, all by its rule.

    Raises:
      ValueError: one of them cannot, or two tiers want it noted in different ways.
    """
    last = max(i for i, tier in enumerate(tiers) if tier.wants_noted)
    rule, found = tiers[last].wants_noted, list(tiers)
    assert isinstance(rule, Noting)
    for i, tier in enumerate(tiers[:last]):
        if isinstance(tier, Window):
            found[i] = dataclasses.replace(tier, observe_attention=True if type(rule) is Noting else rule)
        elif isinstance(tier, Sink):
            continue
        elif tier.wants_noted != rule or not tier.keeps_notes:
            raise ValueError(f"a tier that needs scores has {tier!r} before it, which does not note them by its rule")
    if not tiers[last].keeps_notes and not any(isinstance(tier, Window) for tier in tiers[:last]):
        raise ValueError("a tier that needs scores must have a Window before it, which notes them")
    return found
