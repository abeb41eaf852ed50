"""The tokens that a model chooses at several places at once, as it would have chosen them one after another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from streamjax.attention.token_tree import TokenTree
from streamjax.streaming.sampling import Sampler


def seen_at(used: Bool[Array, "B V"], tokens: Int[Array, "B C"]) -> Bool[Array, "B C V"]:
    """Which ids each stream has read when it has read its first 1, 2, ..., C of `tokens` too."""
    marks = jax.nn.one_hot(tokens, used.shape[-1], dtype=jnp.int8)
    return used[:, None] | (jax.lax.cummax(marks, axis=1) > 0)


def seen_in_tree(used: Bool[Array, "B V"], tokens: Int[Array, "B N"], tree: TokenTree) -> Bool[Array, "B N V"]:
    """Which ids each stream has read when it has gone on along a tree's path to each node."""
    marks = jax.nn.one_hot(tokens, used.shape[-1], dtype=jnp.float32)
    return used[:, None] | (jnp.einsum("bij,bjv->biv", tree.sees.astype(jnp.float32), marks) > 0)


def choose(
    sampler: Sampler,
    logits: Float[Array, "B C V"],
    key: Array | None,
    index: Int32[Array, " B"],
    seen: Bool[Array, "B C V"] | None = None,
    depth: Int32[Array, "B C"] | None = None,
) -> Int32[Array, "B C"]:
    """The token behind each place, row b's with draws `index[b]`, `index[b] + 1`, ... of the key.

    With the `depth` of a tree's nodes, with draws `index[b] + depth[b]`: nodes of one level have one draw.

    They are the very numbers that `generate` draws with: draw i of a batch is made for all of its rows, and each takes
    its own. So a row costs as many numbers as there are rows, which matters where many are sampled on a CPU.
    """
    b, c, v = logits.shape
    flat = logits.reshape(b * c, v).astype(jnp.float32)
    flat = sampler.filter(flat, None if seen is None else seen.reshape(b * c, v))
    if sampler.greedy:
        return jnp.argmax(flat, axis=-1).astype(jnp.int32).reshape(b, c)
    if key is None:
        raise ValueError("sampling needs a PRNG key: pass key=jax.random.key(seed), or temperature=0")

    def draw(row: Array, index: Array, logits: Array) -> Array:
        same = jnp.broadcast_to(logits, (b, v))
        return jax.random.categorical(jax.random.fold_in(key, index), same, axis=-1)[row]

    rows = jnp.repeat(jnp.arange(b), c)
    places = jnp.arange(c, dtype=jnp.int32) if depth is None else depth
    indices = (index[:, None] + places).reshape(-1)
    return jax.vmap(draw)(rows, indices, flat).astype(jnp.int32).reshape(b, c)
