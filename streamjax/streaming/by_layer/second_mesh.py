"""Streams whose tokens lie on a second mesh, which attends to them: a query goes there, and a partial comes back.

Attention offload (Lamina, 2405.01814) and InstInfer (2409.04992) split a model's work: some devices have the weights,
others the keys and values, and attention is computed where these lie. Here the devices with the weights also have a
cascade's first tiers, windows and sinks; its last tier, `Full` or `Pages(attend_on="mesh")`, lies on the other mesh. Of
each layer and chunk there go queries, where they stand, and the keys and values that fall out of the first tiers, each
once; an output and its log-sum-exp come back. Slots never move.

Programs of one mesh cannot wait for another mesh within. So a step is three programs a layer, which the host calls: up
to the question, the answer there, and the rest of the layer. Equal layers share them.

    with jax.set_mesh(mesh):
        state = init_apart(model, sj.kv.preset("inst_infer", attend_on="mesh"), other_mesh, batch_size=8)
        state, logits = step_apart(model, state, tokens)

`sj.read`, `sj.score`, `sj.generate` and sessions know such a state by where it lies (`lies_apart`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from pallas_kernels.partial import Partial, add_sink_logits, merge
from streamjax.attention.rotary import Rotary
from streamjax.barriers import ordered_after
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.layer_caches.recurrence import BesideRecurrence
from streamjax.kv.layer_caches.slots_of import SlotsOf
from streamjax.kv.query import Implementation, KVTokens, Query, State
from streamjax.kv.tier import Tier
from streamjax.kv.tiers.full import Full
from streamjax.kv.tiers.pages import Pages
from streamjax.models.block import Block
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import layer_of, without_layers
from streamjax.models.mixers.attention import ChunkContext
from streamjax.models.mixers.handed_on.learned_bounds import with_bounds
from streamjax.parallel.rules import constrain, map_state_axes, partition_spec
from streamjax.streaming.state import StreamState, init_state
from streamjax.streaming.step import check_rows, enter, leave

_QUERY = ("batch", None, "heads", None)
_ROWS = ("batch", None)
_KEYS = ("batch", "kv_heads", None, None)
_NAMES = {
    "q": _QUERY,
    "position": _ROWS,
    "seen": _ROWS[:1],
    "valid": _ROWS,
    "slopes": ("heads",),
    "k": _KEYS,
    "v": _KEYS,
    "places": _KEYS[:3],
    "there": _KEYS[:3],
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
    """What goes to the second mesh of a layer and a chunk.

    q: queries before rotation. position, seen, valid, slopes, rotary, scale, softcap, implementation: as in `Query`. k,
    v, places, there: of the tokens that fall to the last tier, as in `KVTokens`.
    """

    q: Float[Array, "B C H D"]
    position: UInt32[Array, "B C"]
    seen: Int32[Array, " B"]
    valid: Bool[Array, "B C"]
    slopes: Float[Array, " H"] | None
    k: Float[Array, "B K N D"]
    v: Float[Array, "B K N V"]
    places: UInt32[Array, "B #K N"]
    there: Bool[Array, "B #K N"]
    rotary: Rotary | None = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(metadata={"static": True})
    implementation: Implementation | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, query: Query, falls: KVTokens) -> Asked:
        """What the last tier needs of both."""
        assert query.valid is not None
        return cls(
            query.raw_q, query.position, query.seen, query.valid, query.slopes, falls.k, falls.v, falls.position,
            falls.valid, query.rotary, query.scale, query.softcap, query.implementation,
        )  # fmt: skip

    def restored(self) -> tuple[Query, KVTokens]:
        """The query, rotated again, and the tokens; what keys were before rotation no last tier asks."""
        query = Query(
            self.q, self.q, self.position, self.seen, self.slopes, self.rotary, self.scale, self.softcap, self.valid,
            implementation=self.implementation,
        )  # fmt: skip
        return query.at_position(self.position), KVTokens(self.k, self.v, self.k, self.places, self.there, self.rotary)


@dataclasses.dataclass(frozen=True)
class _Asking(Cache):
    """The first tiers of a cascade. What `update` gives for a state is theirs, their partial, and what goes further."""

    cascade: Cascade

    @property
    def span(self) -> int:
        return self.cascade.span

    def update(self, state: State, query: Query, tokens: KVTokens) -> tuple[Array, Any]:
        tiers, new, rest = self.cascade.tiers[:-1], list(state), tokens
        for i, tier in enumerate(tiers):
            new[i], rest = tier.absorb(new[i], query, rest)
        parts = [tier.attend(part, query, self.cascade.reach) for tier, part in zip(tiers, new, strict=True)]
        part = merge(*parts, query.attend_own(rest, self.cascade.reach))
        rest = dataclasses.replace(rest, valid=ordered_after(rest.valid, part.out))
        for i, tier in enumerate(tiers):
            new[i], rest = tier.insert(new[i], rest)
        return part.out, (tuple(new), part, Asked.of(query, rest))


def goes(cache: Cache) -> bool:
    """Whether the last tier of a layer's cache lies on the second mesh.

    Raises:
      ValueError: it would, and its tiers need more of a chunk than is sent.
    """
    if not isinstance(cache, Cascade):
        return False
    last = cache.tiers[-1]
    if not isinstance(last, Full) and not (isinstance(last, Pages) and last.attend_on == "mesh"):
        return False
    needs = cache.needs_ids or cache.needs_outputs or cache.borrows is not None
    if needs or any(t.wants_noted or t.chooses_every or t.evicts_per_head for t in cache.tiers):
        raise ValueError(f"{cache!r} notes attention or chooses by it: only windows, sinks, Full and Pages go apart")
    return True


def init_apart(
    model: Decoder,
    cache: Cache | Sequence[Cache],
    mesh: Mesh,
    batch_size: int = 1,
    *,
    implementation: Implementation | None = None,
) -> StreamState:
    """The state of streams that have seen nothing, layers' last tiers on the devices of `mesh`.

    All else lies where the model does. For `step_apart`.

    Args:
      model: on a device, or on a mesh of its own.
      cache: a cascade, or one a layer, that ends in `Full` or in `Pages(attend_on="mesh")`: the preset
        `inst_infer` with attend_on="mesh", or `dense`. Layers with a window of their own keep it where the model is.
      mesh: devices that have none of the model. Rows are split along data, key heads along tensor.
      batch_size, implementation: as in `init_state`.

    Raises:
      ValueError: no layer's cache ends so; a mesh that shares devices with the model; a mesh that splits slots.
    """
    home = model.embedding[...].sharding
    if home.device_set & set(mesh.devices.flat):
        raise ValueError("the second mesh has devices that the model lies on: give it devices of its own")
    if mesh.shape.get("context", 1) > 1:
        raise ValueError("a second mesh splits rows and key heads, not slots: make its axis context 1")
    with jax.default_device(mesh.devices.flat[0]), jax.set_mesh(mesh):
        made = init_state(model, cache, batch_size, implementation=implementation)
    away = [goes(one) for one in made.caches]
    if not any(away) or model.config.hsa is not None:
        raise ValueError(
            'no layer has a cache that ends in Full or in Pages(attend_on="mesh"): none goes apart; take dense, or '
            "inst_infer:attend_on=mesh"
        )
    beside = next((what for what, there in (
        ("a side network", model.remembered is not None),
        ("layers that read another layer's keys", any(isinstance(one, SlotsOf) for one in made.caches)),
        ("layers that keep more than attention reads", any(isinstance(one, BesideRecurrence) for one in made.caches)),
    ) if there), None)  # fmt: skip
    if beside is not None:
        raise ValueError(f"a model with {beside} cannot be read over two meshes: leave the second one away")

    def placed(tree: Any, where: Sharding | Mesh) -> Any:
        return map_state_axes(lambda x, axes: jax.device_put(x, _sharding(where, axes, x.shape)), tree)

    layers = tuple(
        (*placed(state[:-1], home), *placed(state[-1:], mesh)) if far else placed(state, home)
        for far, state in zip(away, made.layers, strict=True)
    )
    rest = dataclasses.replace(made, layers=(), caches=())
    rest = rest.map_axes(lambda x, axes: jax.device_put(x, _sharding(home, axes, x.shape)))
    return dataclasses.replace(rest, layers=layers, caches=made.caches)


def lies_apart(state: StreamState) -> bool:
    """Whether a state is one of `init_apart`: some layer's last tier lies on no device that the rest lies on."""
    if isinstance(state.position, jax.core.Tracer) or not isinstance(state.position, jax.Array):
        return False
    home = state.position.sharding.device_set
    last = [layer[-1] for layer in state.layers if isinstance(layer, tuple) and layer]
    return any(not home & leaf.sharding.device_set for leaf in jax.tree.leaves(last))


def step_apart(
    model: Decoder,
    state: StreamState,
    tokens: Int[Array, "B C"] | Int[np.ndarray, "B C"],
    count: Int32[Array, " B"] | Int32[np.ndarray, " B"] | None = None,
) -> tuple[StreamState, Float[Array, "B C V"]]:
    """`sj.step` for a state of `init_apart`, which is donated: the same numbers, from two meshes.

    To be called from the host, not under `jax.jit`.
    """
    state, hidden = advance_apart(model, state, tokens, count)
    return state, _logits(without_layers(model), hidden)


def advance_apart(
    model: Decoder,
    state: StreamState,
    tokens: Int[Array, "B C"] | Int[np.ndarray, "B C"],
    count: Int32[Array, " B"] | Int32[np.ndarray, " B"] | None = None,
) -> tuple[StreamState, Float[Array, "B C E"]]:
    """`step_apart` with the hidden states in the logits' place. The layers' states are donated, and nothing else."""
    check_rows(state, tokens.shape[0])
    count = np.full((tokens.shape[0],), tokens.shape[1], np.int32) if count is None else count
    model = with_bounds(model)
    ends, layers = without_layers(model), list(state.layers)
    standing = dataclasses.replace(state, layers=())
    x, context = _entered(ends, standing, tokens, count)
    home = x.sharding
    for i, cache in enumerate(state.caches):
        block, row = model.layer_and_row(i)
        if not goes(cache):
            x, layers[i] = _layer(block, row, x, layers[i], context, cache)
            continue
        assert isinstance(cache, Cascade)
        *front, last = layers[i]
        mesh = _mesh_of(last)
        front, near, asked = _asked(block, row, x, tuple(front), context, cache)
        given = {name: part for name in _NAMES if (part := getattr(asked, name)) is not None}
        sent = send(given, {name: _sharding(mesh, _NAMES[name], one.shape) for name, one in given.items()})
        with jax.set_mesh(mesh):
            far, last = _answered(cache.tiers[-1], cache.reach, last, dataclasses.replace(asked, **sent))
        shapes = (_QUERY, far.out), (_QUERY[:3], far.lse)
        far = Partial(*send(tuple(far), tuple(_sharding(home, names, y.shape) for names, y in shapes)))
        x = _continued(block, row, x, near, far)
        layers[i] = (*front, last)
    standing, hidden = _left(ends, standing, x, tokens, count)
    return dataclasses.replace(standing, layers=tuple(layers)), hidden


def send(arrays: Any, shardings: Any) -> Any:
    """Arrays from one mesh to the other: all that crosses."""
    return jax.device_put(arrays, shardings)


def _sharding(where: Sharding | Mesh, names: Any, shape: tuple[int, ...]) -> Sharding:
    """Where an array with these names lies on a mesh, or on all of a model's devices."""
    if isinstance(where, NamedSharding):
        assert isinstance(where.mesh, Mesh)
        where = where.mesh
    return NamedSharding(where, partition_spec(names, shape, where)) if isinstance(where, Mesh) else where


def _mesh_of(state: State) -> Mesh:
    sharding = jax.tree.leaves(state)[0].sharding
    assert isinstance(sharding, NamedSharding)
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


@jax.jit
def _entered(ends: Decoder, state: StreamState, tokens: Array, count: Array) -> tuple[Array, ChunkContext]:
    context, tokens = enter(state, tokens, count)
    return ends.embed(tokens), context


@partial(jax.jit, static_argnames="cache", donate_argnames="state")
def _layer(
    block: Block, row: int | None, x: Array, state: State, context: ChunkContext, cache: Cache
) -> tuple[Array, State]:
    """A layer that keeps its cache."""
    x, state, _ = layer_of(block, row).stream(x, state, cache, context)
    return x, state


@partial(jax.jit, static_argnames="cache", donate_argnames="state")
def _asked(
    block: Block, row: int | None, x: Array, state: tuple[State, ...], context: ChunkContext, cache: Cascade
) -> tuple[tuple[State, ...], Partial, Asked]:
    """A layer up to attention to its first tiers; what comes behind is left out of the program."""
    found: tuple[tuple[State, ...], Partial, Asked] = layer_of(block, row).stream(x, state, _Asking(cache), context)[1]
    return found


@partial(jax.jit, static_argnames=("tier", "reach"), donate_argnames="state")
def _answered(tier: Tier, reach: int | None, state: State, asked: Asked) -> tuple[Partial, State]:
    """Attention to the last tier, which then takes in what falls to it."""
    query, falls = asked.restored()
    part = tier.attend(state, query, reach)
    falls = dataclasses.replace(falls, valid=ordered_after(falls.valid, part.out))
    state = tier.store(state, falls)
    return part, map_state_axes(lambda x, axes: constrain(x, *axes), state)


@jax.jit
def _continued(block: Block, row: int | None, x: Array, part: Partial, far: Partial) -> Array:
    """The layer behind attention."""
    block = layer_of(block, row)
    return block.combine(x, add_sink_logits(merge(part, far), block.attention.learned_sinks()).out)


@jax.jit
def _left(ends: Decoder, state: StreamState, x: Array, tokens: Array, count: Array) -> tuple[StreamState, Array]:
    return leave(state, ends.norm(x), tokens, count)


@jax.jit
def _logits(ends: Decoder, hidden: Array) -> Array:
    return ends.logits(hidden)
