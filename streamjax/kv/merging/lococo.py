"""`Convolved`: what leaves flows into a fixed number of slots, by weights of a convolution (LoCoCo, 2406.05317)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.rotary import Rotary
from streamjax.kv.merging.merge import Merge, Side
from streamjax.kv.query import KVSpec, State
from streamjax.kv.slots.slot_state import take_slots


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The convolution of a layer, as bytes that hash once, for all its key heads.

    kernel: float32 [M, 2 D, w], over tokens in the order of the stream. bias: float32 [M]. blend: share of what the
    convolution says. model: a fingerprint of the model that it was trained with.
    """

    kernel: bytes
    bias: bytes
    blend: float
    width: int
    model: str

    def __repr__(self) -> str:
        return f"Kernels({self.slots} slots, width {self.width}, of model {self.model})"

    @classmethod
    def from_arrays(
        cls, kernel: Float[np.ndarray, "M C w"], bias: Float[np.ndarray, " M"], blend: float, model: str
    ) -> Kernels:
        """The convolution with these weights."""
        found = [np.ascontiguousarray(x, np.float32).tobytes() for x in (kernel, bias)]
        return cls(found[0], found[1], float(blend), kernel.shape[2], model)

    @property
    def slots(self) -> int:
        return len(self.bias) // 4

    @property
    def weights(self) -> tuple[Float[np.ndarray, "M C w"], Float[np.ndarray, " M"], float]:
        kernel = np.frombuffer(self.kernel, np.float32).reshape(self.slots, -1, self.width)
        return kernel, np.frombuffer(self.bias, np.float32), self.blend


@dataclasses.dataclass(frozen=True)
class Convolved(Merge):
    """The M tokens of those that stay that are worth least take in all that leave, and each other.

    Of these and of what leaves, in the order of the stream, a convolution over keys and values says M rows of logits; a
    softmax over the tokens of its positive part is what each slot takes of every token. `blend` of it, and one minus
    that of the slot's own token, is what stands there; positions stay. Nothing changes where nothing leaves. The
    weights lie in the stream's state.

    Args:
      kernels: of the layer. None: they lie in the state already; no state can be made then.
    """

    kernels: Kernels | None = None

    @property
    def made_for(self) -> str | None:
        return None if self.kernels is None else self.kernels.model

    def without_numbers(self) -> Convolved:
        return dataclasses.replace(self, kernels=None)

    def memory(self, spec: KVSpec) -> State:
        """The weights, once a stream.

        Raises:
          ValueError: none are given, or those of a layer with other heads.
        """
        if self.kernels is None:
            raise ValueError("Convolved() has no kernels: train them, python -m train.convolutions")
        kernel, bias, blend = self.kernels.weights
        channels = spec.head_dim + spec.values(0).shape[3]
        if kernel.shape[1] != channels:
            raise ValueError(f"the kernels are of {kernel.shape[1]} channels, and the layer's heads have {channels}")
        rows = spec.batch_size, 1
        arrays = kernel, bias, np.full(1, blend)
        return tuple(jnp.broadcast_to(jnp.asarray(x, jnp.float32), (*rows, *x.shape)) for x in arrays)

    def merged(self, stays: Side, leaves: Side, memory: State, rotary: Rotary | None) -> tuple[Array, Array, State]:
        kernel, bias, blend = (x[0, 0] for x in memory)
        count = kernel.shape[0]
        if count > stays.k.shape[2]:
            raise ValueError(f"the kernels fill {count} slots, and {stays.k.shape[2]} tokens stay: take a larger size")
        start = take_slots(stays.position, jnp.argmax(stays.valid, axis=2, keepdims=True))

        def place(some: Side) -> Array:
            """Right across the wrap of positions; behind all others where there is no token."""
            return jnp.where(some.valid, (some.position - start).astype(jnp.int32), jnp.iinfo(jnp.int32).max)

        little = jnp.where(stays.valid, -jnp.nan_to_num(stays.worth, nan=-jnp.inf), -jnp.inf)
        weak = jax.lax.top_k(little, count)[1]
        weak = jnp.take_along_axis(weak, jnp.argsort(jnp.take_along_axis(place(stays), weak, axis=2), axis=2), axis=2)
        places = jnp.concatenate((jnp.take_along_axis(place(stays), weak, axis=2), place(leaves)), axis=2)
        order = jnp.argsort(places, axis=2, stable=True)
        there = jnp.take_along_axis(places, order, axis=2) < jnp.iinfo(jnp.int32).max
        dtype = accumulator(stays.k.dtype)
        k, v = (
            jnp.where(there[..., None], take_slots(jnp.concatenate((take_slots(a, weak), b), axis=2), order), 0)
            for a, b in ((stays.k, leaves.k), (stays.v, leaves.v))
        )
        pool = jnp.concatenate((k, v), axis=3).astype(dtype)
        # Where there is no token at all nothing is taken, and the gradient of a softmax of nothing would be NaN.
        counts = there | ~there.any(axis=2, keepdims=True)
        logits = jnp.where(counts[:, :, None], jax.nn.relu(convolved(pool, kernel.astype(dtype), bias)), -jnp.inf)
        own = (order[:, :, None] == jnp.arange(count)[:, None]).astype(dtype)  # where the slot's own token stands
        share = blend * jax.nn.softmax(logits, axis=3) + (1 - blend) * own
        fresh = jnp.einsum("bkmn,bknc->bkmc", share, pool, precision="highest")
        new_k, new_v = fresh[..., : k.shape[3]], fresh[..., k.shape[3] :]
        some = leaves.valid.any(axis=2)[..., None, None]

        def put(old: Array, new: Array) -> Array:
            into = jax.vmap(jax.vmap(lambda x, at, y: x.at[at].set(y)))(old, weak, new.astype(old.dtype))
            return jnp.where(some, into, old)

        return put(stays.k, new_k), put(stays.v, new_v), memory


def convolved(
    x: Float[Array, "B K N C"], kernel: Float[Array, "M C w"], bias: Float[Array, " M"]
) -> Float[Array, "B K M N"]:
    """M rows of a convolution over tokens, of which those outside are zeros."""
    rows, heads, count, channels = x.shape
    line = jnp.swapaxes(x.reshape(rows * heads, count, channels), 1, 2)
    side = (kernel.shape[2] - 1) // 2
    found = jax.lax.conv_general_dilated(
        line, kernel, (1,), [(side, kernel.shape[2] - 1 - side)], dimension_numbers=("NCH", "OIH", "NCH"),
        precision="highest",
    )  # fmt: skip
    return found.reshape(rows, heads, -1, count) + bias.astype(x.dtype)[:, None]
