"""`SharedFront`: groups of key heads whose cascades begin with the same tiers, which then hold all heads' tokens.

In LServe (2502.14866) every head keeps sinks and a window, and some heads keep what falls out of it in pages. As groups
of their own the heads would have sinks and windows twice. Here these lie together: one read and one write for all
heads, whichever they are, and only what stands behind differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import Partial, add_sink_logits, merge
from streamjax.barriers import ordered_after
from streamjax.kv.cache import Cache, least
from streamjax.kv.cascade import Cascade
from streamjax.kv.head_groups import ANY_DISTANCE, HeadGroups, of_chosen_heads, of_heads, of_query_heads
from streamjax.kv.query import KVSpec, KVTokens, Query, State
from streamjax.kv.tiers.sink import Sink
from streamjax.kv.tiers.sink_window import SinkWindow
from streamjax.kv.tiers.window import Window


@dataclasses.dataclass(frozen=True, init=False)
class SharedFront(HeadGroups):
    """`HeadGroups` whose cascades begin with the same `front` tiers: what these hold lies together, for all heads.

        sinks = Sink(64, reach=TRUE_DISTANCE)
        SharedFront(2, ((0, 2), Cascade(sinks, Window(256), Pages(64, 8192, 16))),
                       ((1,), Cascade(sinks, Window(256))))

    It computes what `HeadGroups` of the same groups does. Its state is what the front holds, and of each group what
    the tiers behind hold.

    Args:
      front: how many tiers lie together.
      groups: key heads and their cascades, of which any may end with the front. Sinks have the same `reach` in all.

    Raises:
      ValueError: what `HeadGroups` refuses; cascades that do not begin alike; tiers that choose what goes by attention,
        or for each head by itself; tiers behind the front by which a query sees a fixed number of positions back.
    """

    front: int

    def __init__(self, front: int, *groups: tuple[Sequence[int], Cascade]):
        super().__init__(*((heads, _unfused(cascade)) for heads, cascade in groups))
        object.__setattr__(self, "front", front)
        begin = {cascade.tiers[:front] for _, cascade in self.groups}
        if front < 1 or len(begin) > 1 or len(next(iter(begin))) < front:
            raise ValueError(f"SharedFront needs cascades that begin with the same {front} tiers, got {self.groups!r}")
        for tier in (tier for _, cascade in self.groups for tier in cascade.tiers):
            if tier.wants_noted or tier.chooses_every or tier.evicts_per_head or tier.needs_outputs:
                raise ValueError(f"SharedFront has tiers that choose nothing by attention, not {tier!r}")
        if bounded := next(
            (c for _, c in self.groups if self.behind_front(c) is not None and c.reach is not None), None
        ):
            raise ValueError(f"behind a SharedFront is a tier without a bound such as Pages, not {bounded.tiers[-1]!r}")

    @property
    def shared(self) -> Cascade:
        """The tiers in front."""
        return Cascade(*self.groups[0][1].tiers[: self.front], fuse=False)

    def behind_front(self, cascade: Cascade) -> Cascade | None:
        """What a group's cascade has behind the front; None where that is all."""
        rest = cascade.tiers[self.front :]
        return Cascade(*rest, fuse=False) if rest else None

    def init(self, spec: KVSpec) -> tuple[State, ...]:
        self.check(spec)
        states = [self.shared.init(spec)]
        for heads, cascade in self.groups:
            rest = self.behind_front(cascade)
            states.append(() if rest is None else rest.init(dataclasses.replace(spec, kv_heads=len(heads))))
        return tuple(states)

    def update(
        self, state: tuple[State, ...], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple[State, ...]]:
        return self._update(None, state, query, tokens)

    def update_in_order(
        self, order: Int32[Array, " K"], state: tuple[State, ...], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple[State, ...]]:
        return self._update(order, state, query, tokens)

    def _update(
        self, order: Int32[Array, " K"] | None, state: tuple[State, ...], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple[State, ...]]:
        """`update`; the front lies in the layer's order in any case, and what is behind in the groups' own."""
        rests = [self.behind_front(cascade) for _, cascade in self.groups]
        reaches = jnp.asarray(self.reaches)
        if order is not None:
            reaches = jnp.zeros_like(reaches).at[order].set(reaches)
        read = read_front(self.shared, state[0], query, tokens, reaches, falls=any(rests))
        states: list[State] = [read.state]
        parts: list[Partial] = []
        fold = query.q.shape[2] // self.heads
        for (heads, _), rest, part in zip(self.groups, rests, state[1:], strict=True):
            if rest is None:
                none = read.part.out[:, :, : len(heads) * fold], read.part.lse[:, :, : len(heads) * fold]
                parts.append(Partial(jnp.zeros_like(none[0]), jnp.full_like(none[1], -jnp.inf)))
            else:
                if order is None:
                    mine = of_heads(heads, self.heads, query, read.fallen)
                else:
                    mine = of_chosen_heads(order[np.array(heads)], self.heads, query, read.fallen)
                found, part = read_behind(rest, part, *mine)
                parts.append(found)
            states.append(part)
        whole = read.part
        if any(rests):
            whole = merge(whole, self._in_layer_order(order, parts))
        return add_sink_logits(whole, query.sink_logits).out, tuple(states)

    def _in_layer_order(self, order: Int32[Array, " K"] | None, parts: Sequence[Partial]) -> Partial:
        """What the groups gave, each for its own query heads, as the layer has them."""
        place = jnp.argsort(jnp.array([h for heads, _ in self.groups for h in heads], jnp.int32))
        if order is not None:
            place = place[jnp.argsort(order)]
        out, lse = (jnp.concatenate(each, axis=2) for each in zip(*parts, strict=True))
        return Partial(*(of_query_heads(x, place, self.heads, 2) for x in (out, lse)))

    def states_of_groups(self, state: tuple[State, ...]) -> Sequence[tuple[State, ...]]:
        return [(*state[0], *part) for part in state[1:]]

    def levels(self, state: tuple[State, ...]) -> Int32[Array, " B"] | int | None:
        """None of its tiers chooses what goes."""
        reach = int(self.reaches.min())
        return least((Cache.levels(self, state), None if reach == ANY_DISTANCE else reach + 1))

    def parts(self, state: tuple[State, ...]) -> Sequence[tuple[Cascade, int, State]]:
        """Of each part of the state the tiers, key heads, and what they hold."""
        found = [(self.shared, self.heads, state[0])]
        for (heads, cascade), part in zip(self.groups, state[1:], strict=True):
            if (rest := self.behind_front(cascade)) is not None:
                found.append((rest, len(heads), part))
        return found

    def renumbered(self) -> tuple[SharedFront, tuple[int, ...]]:
        plain, order = super().renumbered()
        return SharedFront(self.front, *plain.groups), order

    def plain(self) -> HeadGroups:
        """The same groups, each with a front of its own."""
        return HeadGroups(*self.groups)

    def apart(self, state: tuple[State, ...]) -> tuple[State, ...]:
        """The state of `plain()` that holds the same."""
        probes = [jax.eval_shape(partial(self.shared.init, KVSpec(1, n, 256, jnp.dtype(jnp.float32)))) for n in (2, 3)]
        by_head = [a.shape != b.shape for a, b in zip(*map(jax.tree.leaves, probes), strict=True)]
        leaves, structure = jax.tree.flatten(state[0])
        found = []
        for (heads, _), rest in zip(self.groups, state[1:], strict=True):
            own = [x[:, list(heads)] if each else x for x, each in zip(leaves, by_head, strict=True)]
            found.append((*jax.tree.unflatten(structure, own), *rest))
        return tuple(found)


class FrontRead(NamedTuple):
    """What the tiers in front gave for a chunk.

    part: attention to what they hold, and to the chunk's own tokens unless these are left out. left: tokens of the
    chunk that no tier has absorbed. fallen: what fell out, for the tiers behind. state: the new one.
    """

    part: Partial
    left: Bool[Array, "B 1 C"]
    fallen: KVTokens
    state: tuple[State, ...]


def read_front(
    front: Cascade,
    state: tuple[State, ...],
    query: Query,
    tokens: KVTokens,
    reaches: Int32[Array, " K"],
    falls: bool,
    own: bool = True,
) -> FrontRead:
    """A chunk of all heads read by the tiers in front, of which key head i sees `reaches[i]` positions back.

    `falls`: what falls out is asked for. `own`: attend to the chunk's own tokens too.
    """
    new, rest = list(state), tokens
    if query.tree is None:
        for i, tier in enumerate(front.tiers):
            new[i], rest = tier.absorb(new[i], query, rest)
    near = query
    if query.q.shape[1] > 1:  # a single token sees no farther back than to what a window still holds
        back = jnp.broadcast_to(reaches[:, None], (query.q.shape[0], reaches.shape[0], query.q.shape[1]))
        if query.back is not None:
            back = jnp.minimum(back, query.back if query.back.ndim == 3 else query.back[:, None])
        near = dataclasses.replace(query, back=back)
    parts = [
        tier.attend(part, query if isinstance(tier, Sink) else near, None)
        for tier, part in zip(front.tiers, new, strict=True)
    ]
    if own:
        parts.append(near.attend_own(rest, None))
    whole, left = merge(*parts), rest.valid
    if query.tree is not None:
        return FrontRead(whole, left, dataclasses.replace(tokens, valid=jnp.zeros_like(left)), state)
    if not query.answered:
        rest = dataclasses.replace(rest, valid=ordered_after(rest.valid, whole.out))
    for i, tier in enumerate(front.tiers):
        if falls or i + 1 < len(front.tiers):
            new[i], rest = tier.insert(new[i], rest)
        else:
            new[i] = tier.store(new[i], rest)
    return FrontRead(whole, left, rest, tuple(new))


def read_behind(
    behind: Cascade, state: tuple[State, ...], query: Query, fallen: KVTokens
) -> tuple[Partial, tuple[State, ...]]:
    """Attention of a group's heads to the tiers behind the front, which then take in what fell out of it."""
    if query.tree is not None:
        return behind.attend_stored(state, query), state
    part, _, new = behind.update_stored(state, query, fallen)
    return part, new


def _unfused(cascade: Cascade) -> Cascade:
    """The cascade with sinks and window apart."""
    match cascade.tiers:
        case (SinkWindow(sinks=sinks, window=window, reach=reach), *rest):
            return Cascade(Sink(sinks, reach), Window(window), *rest, fuse=False)
    return cascade
