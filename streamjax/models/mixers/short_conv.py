"""A causal convolution over the newest few tokens, each channel by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.context import exchange
from streamjax.attention.sharded import are_stretches, context_shards, per_device_call
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
        weight, bias = self.weight[...], None if self.bias is None else self.bias[...]
        return _anywhere(x, before, weight, bias, valid, resets)


def one_before(
    x: Float[Array, "B T G D"],
    before: Float[Array, "B 1 G D"],
    valid: Bool[Array, "B T"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T G D"], Float[Array, "B 1 G D"]]:
    """For each of T tokens the one before it, and the newest that counts; zeros in front of the first of a document."""
    taps = jnp.zeros((2, *x.shape[2:]), x.dtype).at[0].set(1)
    return _anywhere(x, before, taps, None, valid, resets)


def newest_inputs(
    x: Float[Array, "B T G D"],
    before: Float[Array, "B W G D"],
    valid: Bool[Array, "B T"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T taps G D"], Float[Array, "B W G D"]]:
    """For each of T tokens the W before it and itself, in this order, and the newest W that count.

    What came before the first token of a document is zeros: of W = 1, `one_before` of each token and the token.
    """
    taps, found = before.shape[1] + 1, []
    for tap in range(taps):
        one = jnp.zeros((taps, *x.shape[2:]), x.dtype).at[tap].set(1)
        found.append(_anywhere(x, before, one, None, valid, resets))
    return jnp.stack([seen for seen, _ in found], axis=2), found[0][1]


def _anywhere(
    x: Float[Array, "B T G D"],
    before: Float[Array, "B W G D"],
    weight: Float[Array, "taps G D"],
    bias: Float[Array, "G D"] | None,
    valid: Bool[Array, "B T"] | None,
    resets: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T G D"], Float[Array, "B W G D"]]:
    """The convolution of `ShortConv`, also of a sequence whose tokens lie over devices."""
    shards = context_shards(x.shape[1])
    if valid is None and shards > 1 and (are_stretches() or x.shape[1] // shards >= before.shape[1]):
        return _over_devices(x, before, weight, bias, resets)
    return _convolve(x, before, weight, bias, valid, resets)


def _over_devices(
    x: Float[Array, "B T G D"],
    before: Float[Array, "B W G D"],
    weight: Float[Array, "taps G D"],
    bias: Float[Array, "G D"] | None,
    resets: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T G D"], Float[Array, "B W G D"]]:
    """Of a sequence over the mesh axis `context`: the newest tokens of each device go to the next one."""

    def own(x: Array, before: Array, weight: Array, bias: Array | None, resets: Array | None) -> tuple[Array, Array]:
        (index, size), tail = exchange.place(), before.shape[1]
        front = jnp.where(index == 0, before.astype(x.dtype), exchange.before(x, tail))
        earlier = None if resets is None else exchange.before(resets, tail)
        total, newest = _convolve(x, front, weight, bias, None, resets, earlier)
        return total, exchange.of_device(size - 1, newest).astype(before.dtype)

    token, few = ("batch", "length", "kv_heads", None), ("batch", None, "kv_heads", None)
    names = (token, few, few[1:], few[2:], token[:2])
    return per_device_call(own, names, (token, few), (x, before, weight, bias, resets))


def _convolve(
    x: Float[Array, "B T G D"],
    before: Float[Array, "B W G D"],
    weight: Float[Array, "taps G D"],
    bias: Float[Array, "G D"] | None,
    valid: Bool[Array, "B T"] | None,
    resets: Bool[Array, "B T"] | None,
    resets_before: Bool[Array, "B W"] | None = None,
) -> tuple[Float[Array, "B T G D"], Float[Array, "B W G D"]]:
    """The convolution of `ShortConv`. resets_before: of the tokens before; none where None."""
    tail, length = before.shape[1], x.shape[1]
    whole = jnp.concatenate((before.astype(x.dtype), x), axis=1)
    of_document = None
    if resets is not None:
        earlier = jnp.zeros((x.shape[0], tail), bool) if resets_before is None else resets_before
        of_document = jnp.cumsum(jnp.concatenate((earlier, resets), axis=1), axis=1)
    total = jnp.zeros(x.shape, accumulator(x.dtype))
    for tap in range(tail + 1):
        seen = whole[:, tap : tap + length]
        if of_document is not None:
            same = of_document[:, tap : tap + length] == of_document[:, tail:]
            seen = jnp.where(same[..., None, None], seen, 0)
        total = total + seen * weight[tap].astype(x.dtype)
    if bias is not None:
        total = total + bias.astype(total.dtype)
    if of_document is not None:
        whole = jnp.where((of_document == of_document[:, -1:])[..., None, None], whole, 0)
    if valid is None:
        newest = whole[:, length:]
    else:
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        newest = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, tail, 0))(whole, count)
    return total.astype(x.dtype), newest.astype(before.dtype)
