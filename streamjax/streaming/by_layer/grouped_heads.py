"""A layer whose key heads cache by different rules, read in parts that layers share.

In a model with `HeadGroups` layers differ in how many heads look far back. As one program a layer, each number has all
of a layer in it: projections, MLP, and both rules. Here the host calls what depends on the number by itself:

    asked       queries, keys and values of all heads          one program for all layers
    group_over  a group of heads: attention to what it stores   one for each cascade and number of heads
    continued   attention to the chunk itself, and the rest     one for all layers

Where cascades begin with the same tiers (`SharedFront`), these are read for all heads at once:

    front_over  all heads: attention to what the front stores   one for all layers
    behind_over a group of heads: what is behind the front      one for each cascade and number of heads

Which heads a group has is data. What a group gives is put into an `Answer` of all heads, in the layer's own order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.partial import Partial, accumulator, add_sink_logits, merge
from streamjax.host_programs import program
from streamjax.kv.cache import Cache
from streamjax.kv.cascade import Cascade
from streamjax.kv.head_groups import HeadGroups, of_chosen_heads
from streamjax.kv.query import Implementation, KVTokens, Query, State
from streamjax.kv.shared_front import SharedFront, read_behind, read_front
from streamjax.models.block import Block
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import layer_of
from streamjax.models.mixers.attention import Attention, ChunkContext
from streamjax.parallel.rules import constrain, map_state_axes
from streamjax.streaming.by_layer.in_turn import Places, in_turn
from streamjax.streaming.state import StreamState


class Answer(NamedTuple):
    """What groups of heads have given so far of a chunk, for all heads of a layer; of the others it means nothing.

    out, lse: attention to what is stored, as in `Partial`. left: tokens of the chunk that no tier has absorbed.
    """

    out: Float[Array, "*N B C H D"]
    lse: Float[Array, "*N B C H"]
    left: Bool[Array, "*N B K C"]

    def with_group(self, place: Int32[Array, " K"], part: Partial, left: Bool[Array, "B #K C"]) -> Answer:
        """With a group's part: key head i is its head `place[i]`, or not one of its own where that is -1."""
        heads = place.shape[0]

        def put(old: Array, new: Array, axis: int, fold: int) -> Array:
            """`new` has its heads, `fold` query heads for each, along `axis`."""
            old_heads, new_heads = (x.reshape(*x.shape[:axis], -1, fold, *x.shape[axis + 1 :]) for x in (old, new))
            found = jnp.take(new_heads, place, axis=axis, mode="clip")
            mine = (place >= 0).reshape(heads, *[1] * (found.ndim - axis - 1))
            return jnp.where(mine, found.astype(old.dtype), old_heads).reshape(old.shape)

        group = self.out.shape[2] // heads
        return Answer(
            put(self.out, part.out, 2, group),
            put(self.lse, part.lse, 2, group),
            jnp.where((place >= 0)[:, None], left, self.left),  # equal for all heads of a group
        )

    def merged(self, place: Int32[Array, " K"], part: Partial) -> Answer:
        """With a group's part beside what its heads have already; see `with_group`."""
        nothing = Answer(jnp.zeros_like(self.out), jnp.full_like(self.lse, -jnp.inf), self.left)
        mine = nothing.with_group(place, part, self.left)
        return self._replace(**merge(Partial(self.out, self.lse), Partial(mine.out, mine.lse))._asdict())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
    """Queries and tokens of chunks: the arrays of `Query` and `KVTokens`, which may lie behind N, the chunks."""

    arrays: tuple[Array, ...]
    structure: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, *parts: Query | KVTokens) -> Asked:
        """Of one chunk."""
        arrays, structure = jax.tree.flatten(parts)
        return cls(tuple(arrays), structure)

    def restored(self) -> tuple[Any, ...]:
        """Of one chunk: what `of` was given."""
        found: tuple[Any, ...] = jax.tree.unflatten(self.structure, self.arrays)
        return found


@dataclasses.dataclass(frozen=True)
class _Asking(Cache):
    """What `update` gives for a state is the chunk's queries and tokens."""

    span: int = 0

    def update(self, state: State, query: Query, tokens: KVTokens) -> tuple[Array, tuple[Query, KVTokens]]:
        return query.q, (query, tokens)


def shares_parts(block: Block, cache: HeadGroups, state: StreamState) -> bool:
    """Whether a layer of this state is read by `read_grouped`."""
    mixer = block.mixer
    if not isinstance(mixer, Attention) or state.tables is not None:
        return False
    config = mixer.config  # behind attention a gate, and keys for other layers, would be computed once more
    again = config.output_gate or config.hands_on_keys or config.keys_of is not None
    return not (again or cache.needs_outputs or block.encoder or block.reader or block.beside)


def channels_between(model: Decoder, state: StreamState) -> int:
    """Channels of a token that lie between the parts of a layer at once, where layers are read in parts."""
    most = 0
    if not model.by_layers:  # a side network has more caches than the model has layers
        return most
    for i, cache in enumerate(state.caches):
        block = model.layer_and_row(i)[0]
        if isinstance(cache, HeadGroups) and shares_parts(block, cache, state):
            config = (
                block.attention.config
            )  # queries twice, rotated and not, keys likewise, values, and what heads gave
            most = max(most, 3 * (config.num_heads + config.num_kv_heads) * config.head_dim)
    return most


def read_grouped(
    block: Block,
    row: int | Int32[Array, ""] | None,
    x: Float[Array, "N B C E"],
    state: tuple[State, ...],
    places: Places,
    cache: HeadGroups,
    span: int,
    implementation: Implementation | None,
) -> tuple[Float[Array, "N B C E"], tuple[State, ...]]:
    """One layer over N chunks, called from the host: its outputs and its new state. See `layer_over`."""
    tempered = block.attention.config.temperature is not None
    chunks, answer = asked(block, row, x, places, span, implementation, cache.span if tempered else 0)
    if isinstance(cache, SharedFront):
        answer, new = _read_shared(chunks, state, cache)
        return continued(block, row, x, chunks, answer, jnp.asarray(cache.reaches), True), new
    leaves = all(cascade.leaves_chunk(x.shape[2]) for _, cascade in cache.groups)
    states = []
    for (heads, cascade), part in zip(cache.groups, state, strict=True):
        cascade, _ = cascade.renumbered()
        part, answer = group_over(part, answer, chunks, *_as_data(heads, cache.heads), cascade, leaves)
        states.append(part)
    return continued(block, row, x, chunks, answer, jnp.asarray(cache.reaches), leaves), tuple(states)


def _as_data(heads: Sequence[int], count: int) -> tuple[Int32[Array, " M"], Int32[Array, " K"]]:
    """Which of a layer's `count` key heads a group has, and which head of the group each of them is, or -1."""
    place = np.full(count, -1, np.int32)
    place[list(heads)] = range(len(heads))
    return jnp.array(heads, jnp.int32), jnp.asarray(place)


def _read_shared(chunks: Asked, state: tuple[State, ...], cache: SharedFront) -> tuple[Answer, tuple[State, ...]]:
    """What all tiers of a layer give whose groups share a front, and the new state."""
    front, _ = cache.shared.renumbered()
    first, answer, fallen = front_over(state[0], chunks, jnp.asarray(cache.reaches), front)
    states = [first]
    for (heads, cascade), part in zip(cache.groups, state[1:], strict=True):
        if (behind := cache.behind_front(cascade)) is not None:
            behind, _ = behind.renumbered()
            part, answer = behind_over(part, answer, chunks, fallen, *_as_data(heads, cache.heads), behind)
        states.append(part)
    return answer, tuple(states)


@program(static_argnames=("span", "implementation", "cache_span"))
def asked(
    block: Block,
    row: int | Int32[Array, ""] | None,
    x: Float[Array, "N B C E"],
    places: Places,
    span: int,
    implementation: Implementation | None,
    cache_span: int,
) -> tuple[Asked, Answer]:
    """What N chunks ask of a layer's cache and what they bring; an answer without parts."""
    block = layer_of(block, row)

    def one(_: tuple, chunk: tuple) -> tuple[tuple, tuple[Asked, Answer]]:
        x, position, valid, seen, ids = chunk
        context = ChunkContext(position, valid, seen, span, ids=ids, implementation=implementation)
        query, tokens = block.stream(x, None, _Asking(cache_span), context)[1]
        dtype, heads, width = accumulator(x.dtype), query.q.shape[:3], tokens.v.shape[3]
        return (), (Asked.of(query, tokens), Answer(
            jnp.zeros((*heads, width), dtype),
            jnp.zeros(heads, dtype),
            jnp.zeros((tokens.k.shape[:3]), bool),
        ))  # fmt: skip

    found: tuple[Asked, Answer] = in_turn(one, (), (x, *places))[1]
    return found


@program(static_argnames=("cascade", "leaves"), donate_argnames=("state", "answer"))
def group_over(
    state: State,
    answer: Answer,
    chunks: Asked,
    heads: Int32[Array, " M"],
    place: Int32[Array, " K"],
    cascade: Cascade,
    leaves: bool,
) -> tuple[State, Answer]:
    """The new state of a group of M heads, and the answer with its part in it.

    `leaves`: attention to the chunk itself is not in it, see `Cascade.update_stored`. `place`: see `Answer.with_group`.
    """

    def one(state: State, chunk: tuple[Asked, Answer]) -> tuple[State, Answer]:
        asked, answer = chunk
        query, tokens = asked.restored()
        mine = of_chosen_heads(heads, place.shape[0], query, tokens)
        if leaves:
            part, left, state = cascade.update_stored(state, *mine)
        else:
            out, state = cascade.update(state, *mine)
            part, left = Partial(out, jnp.zeros(out.shape[:3], out.dtype)), tokens.valid
        state = map_state_axes(lambda leaf, axes: constrain(leaf, *axes), state)
        return state, answer.with_group(place, part, left[:, :1])

    return in_turn(one, state, (chunks, answer))


@program(static_argnames="front", donate_argnames="state")
def front_over(state: State, chunks: Asked, reaches: Int32[Array, " K"], front: Cascade) -> tuple[State, Answer, Asked]:
    """The new state of the tiers in front of all heads, an answer with their part, and N chunks of what fell out.

    Key head i sees `reaches[i]` positions back. Attention to the chunk itself is not in it.
    """

    def one(state: State, chunk: Asked) -> tuple[State, tuple[Answer, Asked]]:
        query, tokens = chunk.restored()
        read = read_front(front, state, query, tokens, reaches, falls=True, own=False)
        state = map_state_axes(lambda leaf, axes: constrain(leaf, *axes), read.state)
        left = jnp.broadcast_to(read.left, tokens.k.shape[:3])
        return state, (Answer(*read.part, left), Asked.of(read.fallen))

    state, (answer, fallen) = in_turn(one, state, chunks)
    return state, answer, fallen


@program(static_argnames="behind", donate_argnames=("state", "answer"))
def behind_over(
    state: State,
    answer: Answer,
    chunks: Asked,
    fallen: Asked,
    heads: Int32[Array, " M"],
    place: Int32[Array, " K"],
    behind: Cascade,
) -> tuple[State, Answer]:
    """The new state of what M heads have behind the front, and the answer with attention to it; see `group_over`."""

    def one(state: State, chunk: tuple[Asked, Answer, Asked]) -> tuple[State, Answer]:
        asked, answer, fallen = chunk
        query, (tokens,) = asked.restored()[0], fallen.restored()
        part, state = read_behind(behind, state, *of_chosen_heads(heads, place.shape[0], query, tokens))
        state = map_state_axes(lambda leaf, axes: constrain(leaf, *axes), state)
        return state, answer.merged(place, part)

    return in_turn(one, state, (chunks, answer, fallen))


@program(static_argnames="leaves")
def continued(
    block: Block,
    row: int | Int32[Array, ""] | None,
    x: Float[Array, "N B C E"],
    chunks: Asked,
    answer: Answer,
    reach: Int32[Array, " K"],
    leaves: bool,
) -> Float[Array, "N B C E"]:
    """The layer's outputs, from its inputs and what all groups of heads have given.

    With `leaves` attention to the chunk itself is computed here, of key head i at most `reach[i]` positions back.
    """
    block = layer_of(block, row)

    def one(_: tuple, chunk: tuple[Array, Asked, Answer]) -> tuple[tuple, Array]:
        x, asked, answer = chunk
        query, tokens = asked.restored()
        part = Partial(answer.out, answer.lse)
        if leaves:
            back = jnp.broadcast_to(reach[:, None], answer.left.shape)
            rest = dataclasses.replace(tokens, valid=answer.left)
            own = dataclasses.replace(query, back=back).attend_own(rest, None)
            part = add_sink_logits(merge(part, own), query.sink_logits)
        return (), block.combine(x, part.out)

    return in_turn(one, (), (x, chunks, answer))[1]
