"""What recurrent token mixers have in common: one function of tokens and a state, from which all forms follow.

A mixer is `recur(x, state) -> (y, state)`. A whole sequence is read behind an empty state, a chunk of a stream behind
the stream's, and chunked backprop hands the state from chunk to chunk and its cotangent back. A new mixer is a file
with a subclass, and a config with its sizes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from streamjax.attention.token_tree import TokenTree
from streamjax.kv.cache import Cache, Deferred
from streamjax.kv.layer_caches.recurrence import Recurrence, RecurrentState
from streamjax.models.config.recurrent import RecurrentConfig
from streamjax.models.mixers.attention import ChunkContext, SequenceContext
from streamjax.models.parameters import kernel, product, zeros
from streamjax.models.quantisation import merge_axes
from streamjax.parallel.rules import constrain

FIRST_STEPS = (1e-3, 1e-1)  # between which initial steps are drawn, evenly in their logarithms,
FIRST_RATES = (1.0, 16.0)  # and initial decay rates: those of Mamba-2


class RecurrentMixer(nnx.Module):
    """A mixer with a state of fixed size.

    `inside` is `[d_model, G, channels]`, all that is made of a token's input, so that one product reads it and tensor
    parallelism splits over groups; `out` is the product of the heads' outputs back. `gain` scales the initial weights
    of `out`.
    """

    def __init__(
        self,
        config: RecurrentConfig,
        d_model: int,
        head_dim: int,
        key: Array,
        dtype: jnp.dtype,
        gain: float,
        bias: bool,
    ):
        self.config = config
        groups, shared, channels = config.num_groups, config.group_size, config.projected // config.num_groups
        key_in, key_out = jax.random.split(key)
        made = ("kv_heads", "head_dim")
        self.inside = kernel(key_in, (d_model, groups, channels), ("embed", *made), d_model, dtype)
        self.inside_bias = zeros((groups, channels), made, dtype) if bias else None
        axes, shape = ("kv_heads", "group", "head_dim", "embed"), (groups, shared, head_dim, d_model)
        self.out = kernel(key_out, shape, axes, config.num_heads * head_dim, dtype, gain, (0, 1, 2))
        self.out_bias = zeros((d_model,), ("activation_embed",), dtype) if bias else None

    def recur(
        self,
        x: Float[Array, "B T W"],
        state: RecurrentState,
        valid: Bool[Array, "B T"] | None = None,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], RecurrentState]:
        """T tokens behind `state`, and the state behind them.

        Behind the layer's own channels, `x` has what the mixer takes of a layer below, and the result what it hands on.

        valid: the tokens that count, the first ones of each row; all where None. A row without any keeps its state bit
        for bit. resets: the tokens that begin with an empty state.
        """
        raise NotImplementedError

    def look_ahead(self, x: Float[Array, "B T W"], state: RecurrentState, prefix: Bool[Array, "B T"]) -> RecurrentState:
        """The state in front of tokens of which the mixer has looked at those of a prefix; as it is, if it does not."""
        return state

    def over(
        self, x: Float[Array, "B T W"], state: RecurrentState, context: SequenceContext
    ) -> tuple[Float[Array, "B T V"], RecurrentState]:
        """A stretch of a sequence behind `state`, and the state behind it."""
        if context.prefix is not None:
            state = self.look_ahead(x, state, context.prefix)
        return self.recur(x, state, resets=context.resets())

    def empty(self, batch_size: int, dtype: Any) -> RecurrentState:
        """The state in front of the first token."""
        return Recurrence(self.config.state_shape, self.config.conv_shape).empty(batch_size, dtype)

    def parallel(self, x: Float[Array, "B T W"], context: SequenceContext) -> Float[Array, "B T V"]:
        """A whole sequence."""
        return self.over(x, self.empty(x.shape[0], x.dtype), context)[0]

    def stream(
        self, x: Float[Array, "B C W"], state: RecurrentState, cache: Cache, context: ChunkContext
    ) -> tuple[Float[Array, "B C V"], RecurrentState | Float[Array, "B C W"]]:
        """A chunk of a stream, and the stream's new state; the chunk itself where its state is to be made later."""
        if context.tree is not None:
            return self._along_paths(x, state, context.tree), x
        y, new = self.recur(x, state, context.valid)
        return y, x if isinstance(cache, Deferred) else new

    def _along_paths(self, x: Float[Array, "B N W"], state: RecurrentState, tree: TokenTree) -> Float[Array, "B N V"]:
        """The nodes of a tree, each behind those above it: a state has no mask, so each path is read by itself."""
        path, valid = tree.paths()
        rows, nodes, _ = path.shape
        index = rearrange(path, "b n d -> b (n d) 1")
        each = rearrange(jnp.take_along_axis(x, index, axis=1, mode="clip"), "b (n d) w -> (b n) d w", n=nodes)
        forked = jax.tree.map(lambda leaf: jnp.repeat(leaf, nodes, axis=0), state)
        y, _ = self.recur(each, forked, rearrange(valid, "b n d -> (b n) d"))
        last = tree.depth.reshape(rows * nodes, 1, 1)
        return jnp.take_along_axis(y, last, axis=1, mode="clip").reshape(rows, nodes, -1)

    def enter(self, x: Float[Array, "B T E"]) -> Float[Array, "B T G D"]:
        """What each group has of the tokens."""
        y = product("bte,egd->btgd", x, self.inside[...])
        y = y if self.inside_bias is None else y + self.inside_bias[...].astype(y.dtype)
        return constrain(y, "batch", "length", "kv_heads", "head_dim")

    def leave(self, heads: Float[Array, "B T G R V"], dtype: jnp.dtype) -> Float[Array, "B T E"]:
        """The heads' outputs back to `d_model` channels."""
        x = rearrange(heads, "b t g r v -> b t (g r v)").astype(dtype)
        y = product("btf,fe->bte", x, merge_axes(self.out[...], 0, 3))
        return y if self.out_bias is None else y + self.out_bias[...].astype(dtype)


def initial_rates(key: Array, heads: int, dtype: jnp.dtype) -> tuple[nnx.Param, nnx.Param]:
    """For each head the logarithm of its decay rate, and the bias of its steps before their softplus."""
    key_rate, key_step = jax.random.split(key)
    rate = jax.random.uniform(key_rate, (heads,), jnp.float32, *FIRST_RATES)
    low, high = (math.log(step) for step in FIRST_STEPS)
    step = jnp.exp(jax.random.uniform(key_step, (heads,), jnp.float32, low, high))
    bias = step + jnp.log(-jnp.expm1(-step))  # the inverse of a softplus
    return nnx.Param(jnp.log(rate).astype(dtype), axes=("heads",)), nnx.Param(bias.astype(dtype), axes=("heads",))
