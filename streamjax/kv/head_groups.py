"""`HeadGroups`: key heads of one layer that cache by different rules.

Some heads of a trained model look far back, most look at the first tokens and at the newest ones (DuoAttention,
2410.10819; RazorAttention, 2407.15891; LServe, 2502.14866). Each group of heads gets a cascade of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int32

from streamjax.checkpoints import read_json, require_file, user_path
from streamjax.kv.cache import Cache, least
from streamjax.kv.cascade import Cascade
from streamjax.kv.query import KVSpec, KVTokens, Query, State

ANY_DISTANCE = 2**31 - 1  # how far back heads see whose cascade has no bound


@dataclasses.dataclass(frozen=True)
class HeadGroups(Cache):
    """Key heads and their cascades: `HeadGroups(((0, 3), Cascade(Full(4096))), ((1, 2), Cascade(Window(256))))`.

    Query heads follow the key head that they share. Groups without heads are left out.

    Raises:
      ValueError: no group, a head in two groups, or a head that is in none.
    """

    groups: tuple[tuple[tuple[int, ...], Cascade], ...]

    def __init__(self, *groups: tuple[Sequence[int], Cascade]):
        kept = tuple((tuple(int(h) for h in heads), cascade) for heads, cascade in groups if len(heads))
        order = [head for heads, _ in kept for head in heads]
        if not order or sorted(order) != list(range(len(order))):
            raise ValueError(f"HeadGroups needs each of the key heads 0, 1, ... in one group, got {order}")
        object.__setattr__(self, "groups", kept)

    @property
    def heads(self) -> int:
        """Key heads of the layer."""
        return sum(len(heads) for heads, _ in self.groups)

    @property
    def slots(self) -> int:
        return max(cascade.slots for _, cascade in self.groups)

    @property
    def span(self) -> int:
        return max(cascade.span for _, cascade in self.groups)

    @property
    def capacity(self) -> int | None:
        return min((c.capacity for _, c in self.groups if c.capacity is not None), default=None)

    @property
    def reach(self) -> int | None:
        reaches = [cascade.reach for _, cascade in self.groups]
        return None if None in reaches else max(reach or 0 for reach in reaches)

    @property
    def needs_ids(self) -> bool:
        return any(cascade.needs_ids for _, cascade in self.groups)

    @property
    def made_for(self) -> str | None:
        return next(filter(None, (cascade.made_for for _, cascade in self.groups)), None)

    @property
    def needs_outputs(self) -> bool:
        return any(cascade.needs_outputs for _, cascade in self.groups)

    def check(self, spec: KVSpec) -> None:
        """Refuse a layer of another number of key heads.

        Raises:
          ValueError: such a layer.
        """
        if spec.kv_heads != self.heads:
            raise ValueError(f"HeadGroups places {self.heads} key heads, the model's layers have {spec.kv_heads}")

    def init(self, spec: KVSpec) -> tuple[State, ...]:
        self.check(spec)
        return tuple(c.init(dataclasses.replace(spec, kv_heads=len(heads))) for heads, c in self.groups)

    def update(
        self, state: tuple[State, ...], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple[State, ...]]:
        outs, states = [], []
        for (heads, cascade), part in zip(self.groups, state, strict=True):
            out, new = cascade.update(part, *of_heads(heads, self.heads, query, tokens))
            outs.append(out)
            states.append(new)
        return in_layer_order([heads for heads, _ in self.groups], outs), tuple(states)

    def update_in_order(
        self, order: Int32[Array, " K"], state: tuple[State, ...], query: Query, tokens: KVTokens
    ) -> tuple[Float[Array, "B C H D"], tuple[State, ...]]:
        """`update` where key head i of the groups is the layer's head `order[i]`, which is data; see `renumbered`."""
        out, state = self.update(state, *of_chosen_heads(order, order.shape[0], query, tokens))
        return of_query_heads(out, jnp.argsort(order), order.shape[0], 2), state

    @property
    def alters_every(self) -> int | None:
        every = [cascade.alters_every for _, cascade in self.groups]
        return min((each for each in every if each is not None), default=None)

    @property
    def notes_attention(self) -> bool:
        return any(cascade.notes_attention for _, cascade in self.groups)

    def unaltered(self, state: tuple[State, ...]) -> Int32[Array, " B"] | int:
        groups = zip((cascade for _, cascade in self.groups), self.states_of_groups(state), strict=True)
        some = least(cascade.unaltered(part) for cascade, part in groups if cascade.alters_every is not None)
        return 1 if some is None else some

    def states_of_groups(self, state: tuple[State, ...]) -> Sequence[tuple[State, ...]]:
        """What each group's cascade holds, tier by tier."""
        return state

    def levels(self, state: tuple[State, ...]) -> Int32[Array, " B"] | int | None:
        return least(cascade.levels(part) for (_, cascade), part in zip(self.groups, state, strict=True))

    def renumbered(self) -> tuple[HeadGroups, tuple[int, ...]]:
        order = tuple(head for heads, _ in self.groups for head in heads)
        groups, first = [], 0
        for heads, cascade in self.groups:
            groups.append((range(first, first + len(heads)), cascade))
            first += len(heads)
        return HeadGroups(*groups), order

    @property
    def reaches(self) -> Int32[np.ndarray, " K"]:
        """How far back each key head sees, sinks apart."""
        reach = np.full(self.heads, ANY_DISTANCE, np.int32)
        for heads, cascade in self.groups:
            if cascade.reach is not None:
                reach[list(heads)] = cascade.reach
        return reach

    def sizes(self, state: tuple[State, ...]) -> Sequence[tuple[int, int]]:
        return [size for cascade, _, part in self.parts(state) for size in cascade.sizes(part)]

    def parts(self, state: tuple[State, ...]) -> Sequence[tuple[Cascade, int, State]]:
        """Of each part of the state the tiers, key heads, and what they hold."""
        return [(cascade, len(heads), part) for (heads, cascade), part in zip(self.groups, state, strict=True)]


def of_heads(heads: Sequence[int], count: int, query: Query, tokens: KVTokens) -> tuple[Query, KVTokens]:
    """Queries and tokens of some of a layer's `count` key heads."""
    index = _index(heads)

    def queries(x: Array) -> Array:
        grouped = rearrange(x, "... (k g) d -> ... k g d", k=count)[..., index, :, :]
        return rearrange(grouped, "... k g d -> ... (k g) d")

    slopes, sinks = (None if x is None else queries(x[:, None])[:, 0] for x in (query.slopes, query.sink_logits))
    mine = dataclasses.replace(query, q=queries(query.q), raw_q=queries(query.raw_q), slopes=slopes, sink_logits=sinks)
    own = {name: getattr(tokens, name)[:, index] for name in ("k", "v", "raw_k")}
    outputs = None if tokens.outputs is None else tokens.outputs[index]
    return mine, dataclasses.replace(tokens, **own, outputs=outputs)


def in_layer_order(groups: Sequence[Sequence[int]], outs: Sequence[Float[Array, "B C _ D"]]) -> Float[Array, "B C H D"]:
    """What groups of key heads gave, each for its query heads, as the layer has them."""
    parts = [rearrange(out, "b c (k g) d -> b c k g d", k=len(heads)) for heads, out in zip(groups, outs, strict=True)]
    order = np.argsort([head for heads in groups for head in heads])
    return rearrange(jnp.concatenate(parts, axis=2)[:, :, _index(order.tolist())], "b c k g d -> b c (k g) d")


def update_in_order(
    cache: Cache, order: Int32[Array, " K"] | None, state: State, query: Query, tokens: KVTokens
) -> tuple[Float[Array, "B C H D"], State]:
    """`cache.update` where the cache's key head i is the layer's head `order[i]`, which is data; see `renumbered`."""
    if order is None:
        return cache.update(state, query, tokens)
    assert isinstance(cache, HeadGroups), "only groups of heads have them in another order"
    return cache.update_in_order(order, state, query, tokens)


def of_chosen_heads(chosen: Int32[Array, " N"], count: int, query: Query, tokens: KVTokens) -> tuple[Query, KVTokens]:
    """`of_heads` of key heads that are data."""
    slopes, sinks = (
        None if x is None else of_query_heads(x, chosen, count, 0) for x in (query.slopes, query.sink_logits)
    )
    q, raw_q = (of_query_heads(x, chosen, count, 2) for x in (query.q, query.raw_q))
    mine = dataclasses.replace(query, q=q, raw_q=raw_q, slopes=slopes, sink_logits=sinks)
    k, v, raw_k = (jnp.take(x, chosen, axis=1, mode="clip") for x in (tokens.k, tokens.v, tokens.raw_k))
    outputs = None if tokens.outputs is None else jnp.take(tokens.outputs, chosen, axis=0, mode="clip")
    return mine, dataclasses.replace(tokens, k=k, v=v, raw_k=raw_k, outputs=outputs)


def of_query_heads(x: Array, chosen: Int32[Array, " N"], count: int, axis: int) -> Array:
    """The query heads of chosen ones of `count` key heads, which lie along `axis` one key head after another."""
    grouped = x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
    taken = jnp.take(grouped, chosen, axis=axis, mode="clip")
    return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _index(heads: Sequence[int]) -> slice | np.ndarray:
    """A slice where the heads lie side by side in order, which takes without gathering."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return slice(heads[0], heads[0] + len(heads))
    return np.array(heads)


def split_by_gates(
    name: str,
    file: str | Path,
    share: float,
    far: Cascade,
    near: Cascade,
    group: Callable[..., HeadGroups] = HeadGroups,
) -> tuple[HeadGroups, ...]:
    """For each layer of the model that `file` is for: `far` in the heads that look far back, `near` in the others.

    Args:
      name: of the cache that asks, for the message.
      file: see `read_gates`.
      share, far, near: see `far_heads`.
      group: makes a layer's cache of pairs of heads and cascades.

    Raises:
      ValueError: no file is named, or what `read_gates` and `far_heads` refuse.
    """
    if not file:
        raise ValueError(f"cache {name!r} needs a file of head gates: heads=FILE.json, or DuoAttention's own .tsv")
    return tuple(group((looking, far), (others, near)) for looking, others in far_heads(read_gates(file), share))


def read_gates(path: str | Path) -> Float[np.ndarray, "L K"]:
    """How much each key head of each layer needs to look far back, in [0, 1], from a file.

    A `.json` file has them as `{"gates": [[...], ...]}`, one list a layer; a `.tsv` file, as DuoAttention publishes
    them, has one line a layer.

    Raises:
      ValueError: no such file, or one without a table of gates; one line that names it.
    """
    path = user_path(path)
    try:
        require_file(path)
        if path.suffix == ".tsv":
            gates = np.loadtxt(path, delimiter="\t", ndmin=2)
        else:
            gates = np.array(read_json(path)["gates"], np.float64)
    except (OSError, OverflowError, ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ValueError(f"{path}: no gates of heads could be read: {reason}") from None
    if gates.ndim != 2 or not gates.size or not np.isfinite(gates).all():
        raise ValueError(f"{path}: gates must be a table of numbers, a line a layer and a column a key head")
    return gates


def far_heads(gates: Float[np.ndarray, "L K"], share: float) -> list[tuple[list[int], list[int]]]:
    """For each layer, the heads that look far back and the others: the `share` of all heads with the largest gates.

    Raises:
      ValueError: a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of heads that look far back must be in [0, 1], got {share}")
    ranked = np.argsort(-gates, axis=None, kind="stable")
    chosen = np.isin(np.arange(gates.size), ranked[: round(share * gates.size)]).reshape(gates.shape)
    return [(np.flatnonzero(layer).tolist(), np.flatnonzero(~layer).tolist()) for layer in chosen]
