"""`Merge`: what becomes of tokens that a tier cannot keep. A new rule is a file of some forty lines.

    @dataclasses.dataclass(frozen=True)
    class IntoNearest(Merge):
        def join(self, stays: Side, leaves: Side, memory: State) -> Joining:
            target, cosine = most_alike(leaves, stays)
            return Joining(target, cosine > 0.5, jnp.ones(stays.k.shape[:3]), memory)

A `Scored` tier calls it where it makes room. Each token that leaves joins one that stays, in each head by itself: keys
and values of all that come together are averaged. The result stands in the place of the token that stays, at its
position and with what was noted of it. Keys are averaged as they are stored, rotated, as the papers' code does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.partial import accumulator
from streamjax.attention.rotary import Rotary
from streamjax.field_checks import check_fields
from streamjax.kv.query import KVSpec, State
from streamjax.kv.slots.slot_state import SlotState, take_slots

LEAVING_BLOCK = 256  # tokens that leave of which logits against all that stay exist at a time


class Side(NamedTuple):
    """Tokens that stay, or that leave, in no order. `worth`: what the tier's score gave them."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S V"]
    position: UInt32[Array, "B K S"]
    valid: Bool[Array, "B K S"]
    worth: Float[Array, "B K S"]


def side(slots: SlotState, worth: Float[Array, "B N S"], at: Int32[Array, "B N M"]) -> Side:
    """The tokens in these slots, each head's by itself."""

    def take(x: Array) -> Array:
        found = take_slots(x, jnp.broadcast_to(at, (*x.shape[:2], at.shape[2])))
        return jnp.broadcast_to(found, (*slots.k.shape[:2], *found.shape[2:]))

    return Side(*(take(x) for x in (slots.k, slots.v, slots.position, slots.valid, worth)))


class Joining(NamedTuple):
    """target: which of the S tokens that stay each of the F that leave joins. weight: what it weighs there, 0 where it
    is dropped. own: what the token that stays weighs. memory: the rule's, behind this choice."""

    target: Int32[Array, "B K F"]
    weight: Float[Array, "B K F"] | Bool[Array, "B K F"]
    own: Float[Array, "B K S"]
    memory: State = ()


@dataclasses.dataclass(frozen=True)
class Merge:
    """How tokens that leave join those that stay. Subclasses are frozen dataclasses.

    Args:
      turned: a key is turned to the position of the token that it joins before they are averaged.
    """

    turned: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def made_for(self) -> str | None:
        """A fingerprint of the model that it was trained with; None where it serves every model."""
        return None

    def without_numbers(self) -> Merge:
        """A rule that is equal for layers whose trained numbers differ; where there are any, states hold them."""
        return self

    def memory(self, spec: KVSpec) -> State:
        """What the rule keeps from one choice to the next: a pytree of arrays [B, K, ...]."""
        return ()

    def join(self, stays: Side, leaves: Side, memory: State) -> Joining:
        """Who joins whom. Of tokens that are not `valid` anything may be said."""
        raise NotImplementedError

    def merged(self, stays: Side, leaves: Side, memory: State, rotary: Rotary | None) -> tuple[Array, Array, State]:
        """Keys and values of the tokens that stay, and the memory, after those that leave have joined them."""
        found = self.join(stays, leaves, memory)
        k = leaves.k
        if self.turned and rotary is not None:
            k = rotary.moved(k, take_slots(stays.position, found.target) - leaves.position)
        weight = jnp.where(leaves.valid, found.weight.astype(jnp.float32), 0.0)
        joined = summed(jnp.ones_like(stays.worth[..., None]), weight[..., None], found.target)[..., 0] > 0

        def averaged(mine: Array, theirs: Array) -> Array:
            if not mine.shape[-1]:  # keys are values
                return mine
            dtype = accumulator(mine.dtype)
            own, more = found.own[..., None].astype(dtype), weight[..., None].astype(dtype)
            total = own + summed(own, more, found.target)
            both = own * mine.astype(dtype) + summed(mine.astype(dtype), more * theirs.astype(dtype), found.target)
            mean = both / jnp.where(total > 0, total, 1.0)
            return jnp.where(joined[..., None], mean.astype(mine.dtype), mine)

        return averaged(stays.k, k), averaged(stays.v, leaves.v), found.memory


def summed(
    like: Float[Array, "B K S X"], x: Float[Array, "B K F X"], target: Int32[Array, "B K F"]
) -> Float[Array, "B K S X"]:
    """The sum of what goes to each target; zeros shaped as `like` elsewhere."""

    def add(zeros: Array, x: Array, target: Array) -> Array:
        return zeros.at[target].add(x)

    return jax.vmap(jax.vmap(add))(jnp.zeros_like(like), x.astype(like.dtype), target)


def most_alike(leaves: Side, stays: Side) -> tuple[Int32[Array, "B K F"], Float[Array, "B K F"]]:
    """For each token that leaves, which one that stays has the most similar key, and their cosine."""
    there, mine = unit(stays.k), unit(leaves.k)

    def best(some: Array) -> tuple[Array, Array]:
        cosine = jnp.einsum("bkfd,bksd->bkfs", some, there, precision="highest")
        cosine = jnp.where(stays.valid[:, :, None], cosine, -jnp.inf)
        return jnp.argmax(cosine, axis=3).astype(jnp.int32), jnp.max(cosine, axis=3)

    return in_blocks(best, mine)


def in_blocks(fn: Callable[..., Any], *arrays: Array) -> Any:
    """`fn` of arrays [B, K, F, ...], over at most `LEAVING_BLOCK` of their F tokens at a time."""
    count = arrays[0].shape[2]
    if count <= LEAVING_BLOCK:
        return fn(*arrays)
    blocks = -(-count // LEAVING_BLOCK)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, blocks * LEAVING_BLOCK - count if axis == 2 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], blocks, LEAVING_BLOCK, *x.shape[3:]), 2, 0)

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], blocks * LEAVING_BLOCK, *x.shape[4:])[:, :, :count]

    return jax.tree.map(joined, jax.lax.map(lambda some: fn(*some), tuple(cut(x) for x in arrays)))


def unit(k: Float[Array, "B K S D"]) -> Float[Array, "B K S D"]:
    """Keys of length one; a key without a direction stays as it is."""
    k = k.astype(accumulator(k.dtype))
    length = jnp.linalg.norm(k, axis=-1, keepdims=True)
    return k / jnp.where(length > 0, length, 1.0)


def positions_apart(leaves: Side, stays: Side) -> Int32[Array, "B K F S"]:
    """How many positions each token that leaves came before each one that stays; right across the counter's wrap."""
    return (stays.position[:, :, None] - leaves.position[..., None]).astype(jnp.int32)
