"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1) as a token mixer.

Over a whole sequence the latents become keys and values of every head, which costs the fewest products. In a stream,
and in chunked backprop, they stay as they are: the up-projection of keys goes into the queries and that of values
behind the sum (the paper's "absorbed" form), so that all heads attend to one key a token, the rotary channels and the
latent, which is its value too. A test proves the two equal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from streamjax.attention.dispatch import sequence_attention
from streamjax.kv.cache import Cache
from streamjax.kv.query import State
from streamjax.models.config import LatentAttentionConfig
from streamjax.models.mixers.attention import ChunkContext, SequenceContext, stream_attention
from streamjax.models.norms import Norm
from streamjax.models.parameters import kernel, product
from streamjax.models.quantisation import merge_axes
from streamjax.models.rope import make_rotary
from streamjax.parallel.rules import constrain


class LatentAttention(nnx.Module):
    """Attention of one layer through latents."""

    def __init__(self, config: LatentAttentionConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        c, d, keys = config, d_model, jax.random.split(key, 6)
        self.config = config
        self.sink_logits = None
        heads, width = ("heads", "head_dim"), (c.num_heads, c.query_dim)
        self.q_down = None if c.q_rank is None else kernel(keys[0], (d, c.q_rank), ("embed", "latent"), d, dtype)
        self.q_norm = None if c.q_rank is None else Norm(c.q_rank, c.norm, dtype, "latent")
        rank, axis = (d, "embed") if c.q_rank is None else (c.q_rank, "latent")
        self.q_up = kernel(keys[1], (rank, *width), (axis, *heads), rank, dtype)
        self.k_rope = kernel(keys[2], (d, c.rope_dim), ("embed", "head_dim"), d, dtype)
        self.kv_down = kernel(keys[3], (d, c.kv_rank), ("embed", "latent"), d, dtype)
        self.kv_norm = Norm(c.kv_rank, c.norm, dtype, "latent")
        self.kv_up = kernel(
            keys[4], (c.kv_rank, c.num_heads, c.nope_dim + c.value_dim), ("latent", *heads), c.kv_rank, dtype
        )
        out = (c.num_heads, c.value_dim, d)
        self.out = kernel(keys[5], out, (*heads, "embed"), c.num_heads * c.value_dim, dtype, gain, (0, 1))

    def learned_sinks(self) -> None:
        """No learned logits."""
        return

    def slopes(self) -> None:
        """No ALiBi."""
        return

    def value_outputs(self) -> Array:
        """Values are latents of all heads at once, which the output does not take one by one.

        Raises:
          ValueError: always.
        """
        raise ValueError("a score that weighs values by the layer's output cannot be used with latent attention")

    def parallel(self, x: Float[Array, "B T E"], context: SequenceContext) -> Float[Array, "B T E"]:
        """Attention of a whole sequence to itself, each head with keys and values of its own."""
        c, (nope, turning), (fixed, latent) = self.config, self._queries(x), self._latents(x)
        both = product("btr,rhd->bthd", latent, self.kv_up[...])
        shared = jnp.broadcast_to(fixed[:, :, None], (*both.shape[:3], c.rope_dim))
        axes = ("batch", "length", "heads", "head_dim")
        q, k = (
            constrain(self._rotated(jnp.concatenate(pair, axis=-1), context), *axes)
            for pair in ((turning, nope), (shared, both[..., : c.nope_dim]))
        )
        v = jnp.pad(both[..., c.nope_dim :], ((0, 0),) * 3 + ((0, c.query_dim - c.value_dim),))
        out = sequence_attention(
            q,
            k,
            constrain(v, *axes),
            c.pattern,
            segment_ids=context.segment_ids,
            scale=c.softmax_scale,
            exchange=context.exchange,
        )
        return self._out(out[..., : c.value_dim], x.dtype)

    def project(
        self, x: Float[Array, "B T E"], context: SequenceContext
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T 1 D"], Float[Array, "B T 1 D"]]:
        """Rotated queries and keys in the absorbed form, and values, which are the keys."""
        q, k = self._absorbed(x)
        q, k = self._rotated(q, context), self._rotated(k, context)
        return constrain(q, "batch", "length", "heads", "head_dim"), k, k

    def keys(
        self, x: Float[Array, "B T E"], context: SequenceContext
    ) -> tuple[Float[Array, "B T 1 D"], Float[Array, "B T 1 D"]]:
        """Keys and values of `project` alone."""
        k = self._rotated(jnp.concatenate(self._latents(x), axis=-1)[:, :, None], context)
        return k, k

    def _rotated(self, x: Array, context: SequenceContext) -> Array:
        if self.config.rope is None:
            return x
        return make_rotary(self.config.rope, x.shape[-1], context.length)(x, context.position)

    def stream(
        self, x: Float[Array, "B C E"], state: State, cache: Cache, context: ChunkContext
    ) -> tuple[Float[Array, "B C E"], State]:
        """Attention of a chunk to a cascade and to itself; the cascade takes the chunk in.

        Values are keys: a cache that `shares_values` keeps no values, others keep the keys twice.
        """
        q, k = self._absorbed(x)
        out, state = stream_attention(self, q, k, k[..., :0] if cache.shares_values else k, state, cache, context)
        return self.join(out, x), state

    def join(self, heads: Float[Array, "B T H D"], x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """From what the heads read, in the absorbed form, back to `d_model` channels; `x` is the mixer's input."""
        read = heads[..., self.config.rope_dim :].astype(x.dtype)
        return self._out(product("bthr,rhd->bthd", read, self.kv_up[..., self.config.nope_dim :]), x.dtype)

    def _absorbed(self, x: Array) -> tuple[Float[Array, "B T H D"], Float[Array, "B T 1 D"]]:
        """Queries and keys before rotation: rotary channels first, then what meets the latent."""
        nope, turning = self._queries(x)
        met = product("bthd,rhd->bthr", nope, self.kv_up[..., : self.config.nope_dim])
        return jnp.concatenate((turning, met), axis=-1), jnp.concatenate(self._latents(x), axis=-1)[:, :, None]

    def _queries(self, x: Array) -> tuple[Float[Array, "B T H N"], Float[Array, "B T H R"]]:
        """The channels of each query that do not rotate, and those that will."""
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(product("bte,er->btr", x, self.q_down[...]))
        q = product("btr,rhd->bthd", x, self.q_up[...])
        return q[..., : self.config.nope_dim], self._halves(q[..., self.config.nope_dim :])

    def _latents(self, x: Array) -> tuple[Float[Array, "B T R"], Float[Array, "B T L"]]:
        """The rotary channels of a token's key, and its latent."""
        latent = self.kv_norm(product("bte,er->btr", x, self.kv_down[...]))
        return self._halves(product("bte,er->btr", x, self.k_rope[...])), latent

    def _halves(self, x: Array) -> Array:
        """Rotary channels with the first ones of all pairs in front of the second ones."""
        return rearrange(x, "... (pair two) -> ... (two pair)", two=2) if self.config.interleaved else x

    def _out(self, heads: Float[Array, "B T H V"], dtype: jnp.dtype) -> Float[Array, "B T E"]:
        x = rearrange(heads, "b t h v -> b t (h v)").astype(dtype)
        return product("btf,fe->bte", x, merge_axes(self.out[...], 0, 2))
