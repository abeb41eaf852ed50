"""LoRA (2106.09685): a change of low rank beside a projection whose own weights stay as they are.

For a projection `y = x W` an adapter computes `(alpha / rank) (x A) B`, which the projection adds. `A B` is never made,
so a frozen `W` costs neither a gradient of its size nor memory for one. What there is to do with adapters on a whole
model is in `lora.py`.
"""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # projections that can have one, by their published names


class LoRAParam(nnx.Param):
    """A factor of an adapter: `loss_and_grad(..., trainable=LoRAParam)` trains these and nothing else.

    Example:
      >>> from flax import nnx
      >>> tuned = sj.add_lora(model, rank=4, alpha=8.0, targets=("q", "v"), key=jax.random.key(0))
      >>> len(jax.tree.leaves(nnx.state(tuned, sj.LoRAParam)))  # two factors of two projections in two layers
      8
    """


class Adapter(nnx.Module):
    """The two factors of one projection's change.

    Args:
      a: [*in, rank], the projection's input axes and the rank.
      b: [rank, *out], the rank and the projection's output axes.
      alpha: the change is scaled by alpha / rank.
      axes: logical names of the projection's input axes, and of its output axes.
    """

    def __init__(self, a: Array, b: Array, alpha: float, axes: tuple[tuple[str, ...], tuple[str, ...]]):
        self.alpha = float(alpha)
        self.a = LoRAParam(a, axes=(*axes[0], "lora"))
        self.b = LoRAParam(b, axes=("lora", *axes[1]))

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        """The factor on `A B`."""
        return self.alpha / self.rank

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T ..."]:
        """What is added to the projection of `x`, whose input axes are merged into one."""
        down = rearrange(self.a[...], "... r -> (...) r").astype(x.dtype)
        low = jnp.einsum("btf,fr->btr", x, down) * self.scale
        return jnp.einsum("btr,r...->bt...", low, self.b[...].astype(x.dtype))

    def product(self) -> Float[Array, "..."]:
        """The change of the projection's weights, `(alpha / rank) A B`; of a stack of layers, one a layer."""
        inputs, outputs = len(self.a.axes) - 1, len(self.b.axes) - 1
        a, b = self.a[...], self.b[...] * self.scale
        rows = a.shape[: a.ndim - inputs - 1]
        whole = jnp.matmul(a.reshape(*rows, -1, self.rank), b.reshape(*rows, self.rank, -1), precision="highest")
        return whole.reshape(*a.shape[:-1], *b.shape[b.ndim - outputs :])


def pad_members(x: Float[Array, "*N g D"], members: int, first: int) -> Float[Array, "*N G D"]:
    """`x` as members `first` and following of `members`, the others zero."""
    widths = [(0, 0)] * x.ndim
    widths[-2] = (first, members - first - x.shape[-2])
    return jnp.pad(x, widths)


def add_adapted(
    y: Float[Array, "B T *N G D"], x: Float[Array, "B T F"], *adapters: tuple[Adapter | None, int]
) -> Float[Array, "B T *N G D"]:
    """A fused projection `y` of `x` with its adapters' parts added.

    Each adapter comes with the first of the members, on the last axis of `y` but one, that it changes. One whose
    members lie before those of `y` (the index is negative) has no part in it.
    """
    for adapter, first in adapters:
        if adapter is not None and first >= 0:
            y = y + pad_members(adapter(x), y.shape[-2], first)
    return y
