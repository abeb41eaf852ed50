"""A causal convolution over the newest few tokens, each channel by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.models.parameters import kernel, zeros


class ShortConv(nnx.Module):
    """Channels in G groups of D; `weight` is `[width, G, D]`, the newest token's last."""

    def __init__(self, width: int, groups: int, channels: int, key: Array, dtype: jnp.dtype, bias: bool = False):
        axes = ("conv", "kv_heads", "head_dim")
        self.weight = kernel(key, (width, groups, channels), axes, width, dtype, inputs=())
        self.bias = zeros((groups, channels), axes[1:], dtype) if bias else None

    def __call__(
        self,
        x: Float[Array, "B T G D"],
        before: Float[Array, "B W G D"],
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T G D"], Float[Array, "B W G D"]]:
        """The convolution of T tokens, and the newest W that count, behind the W `before` them; W is the width less 1.

        valid: the tokens that count, the first ones of each row; all where None. resets: tokens that see none before
        them.
        """
        weight, tail, length = self.weight[...], before.shape[1], x.shape[1]
        whole = jnp.concatenate((before.astype(x.dtype), x), axis=1)
        of_document = None
        if resets is not None:
            of_document = jnp.pad(jnp.cumsum(resets, axis=1), ((0, 0), (tail, 0)))
        total = jnp.zeros(x.shape, accumulator(x.dtype))
        for tap in range(tail + 1):
            seen = whole[:, tap : tap + length]
            if of_document is not None:
                same = of_document[:, tap : tap + length] == of_document[:, tail:]
                seen = jnp.where(same[..., None, None], seen, 0)
            total = total + seen * weight[tap].astype(x.dtype)
        if self.bias is not None:
            total = total + self.bias[...].astype(total.dtype)
        if of_document is not None:
            whole = jnp.where((of_document == of_document[:, -1:])[..., None, None], whole, 0)
        if valid is None:
            newest = whole[:, length:]
        else:
            count = jnp.sum(valid, axis=1, dtype=jnp.int32)
            newest = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, tail, 0))(whole, count)
        return total.astype(x.dtype), newest.astype(before.dtype)
