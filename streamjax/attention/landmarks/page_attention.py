"""Hierarchical sparse attention over pages: choose pages by landmarks, attend inside each, weigh by the choice.

HSA of "Hardware-aligned Hierarchical Sparse Attention" (2504.16795), as HSA-UltraLong (2511.23319) uses it. A page (the
papers' chunk) of S tokens has keys, values and one landmark. A token scores pages by `r = retrieval . landmark /
sqrt(D)`, takes the best `top_k`, attends to each of them by a softmax of its own, and sums the outputs weighted by the
softmax of their scores. So the scores get gradients through the weights.

Three forms of the same sum: over all pages with most weights zero, which is products of matrices; over gathered pages,
whose work does not grow with the context; and the platform's kernel, which sorts queries by the pages that they chose,
so that its work is products of matrices and does not grow with the context either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.argument_checks import DTYPES
from pallas_kernels.partial import accumulator
from streamjax.attention.block_cutting import cut_blocks, join_blocks
from streamjax.attention.landmarks.page_choice import VisiblePages, choose
from streamjax.attention.sharded import per_device_call

Implementation = Literal["dense", "gathered", "pallas"]
QUERY_BLOCK = 128  # queries whose logits exist at a time
SPANS = 8  # parts of a sequence that each work with as many pages as their last query needs
GATHERED = 2**23  # keys times channels that are gathered at a time
DENSE_CHUNKS = 8  # the dense form works on at most so many times more pages than are chosen
_NAMES = (  # of the dimensions of queries, keys, values, choices and weights
    ("batch", "length", "heads", None),
    *(("batch", "kv_heads", None, None, None),) * 2,
    *(("batch", "kv_heads", "length", None),) * 2,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LandmarkPages:
    """P pages of S tokens: what a memory is made of.

    k, v: of their tokens, [B, K, P, S, D]. landmarks: [B, K, P, D].
    """

    k: Float[Array, "B K P S D"]
    v: Float[Array, "B K P S D"]
    landmarks: Float[Array, "B K P D"]

    def read(
        self,
        q: Float[Array, "B C H D"],
        retrieval: Float[Array, "B C K D"],
        visible: VisiblePages,
        top_k: int,
        scale: float,
        implementation: Implementation | None = None,
        start: int | None = None,
    ) -> Float[Array, "B C H D"]:
        """The attention of queries to their chosen pages; zero where a query sees no page.

        Args:
          q: queries of the attention inside pages.
          retrieval: queries of the landmarks, one for each group of heads, which choose together.
          visible: which pages each query may choose.
          top_k: pages that a query reads, at most.
          scale: factor on the dot products inside pages.
          implementation: compute with all pages ("dense"), gather the chosen ones ("gathered"), or take the platform's
            kernel ("pallas"); None chooses by shapes and platform, and logs a kernel once.
          start: the pages lie in order from 0, and this is the first query's token of their sequence: then work on
            pages that lie behind a query is left out.

        Raises:
          ValueError: an unknown implementation, or no kernel for the platform or for these arguments.
        """
        if implementation not in (None, "dense", "gathered", "pallas"):
            raise ValueError(f"unknown implementation {implementation!r}; use 'dense', 'gathered' or 'pallas'")
        if implementation is None and self._kernel_pays(q, top_k):
            platforms.log_choice("hierarchical attention over many chunks", "pallas")
            implementation = "pallas"
        parts = list(self._parts(visible, q.shape[1], start))
        if implementation == "pallas":
            found = [chunks._choices(retrieval[:, at], seen, top_k) for at, chunks, seen in parts]
            chosen, weights = (jnp.swapaxes(jnp.concatenate(x, axis=1), 1, 2) for x in zip(*found, strict=True))
            return per_device_call(
                lambda *arrays: api.hsa_attention(*arrays, scale=scale), _NAMES, _NAMES[0],
                (q, self.k, self.v, chosen, weights),
            )  # fmt: skip
        outs = [
            chunks._attend(q[:, at], retrieval[:, at], seen, top_k, scale, implementation) for at, chunks, seen in parts
        ]
        return jnp.concatenate(outs, axis=1)

    def _kernel_pays(self, q: Array, top_k: int) -> bool:
        """Whether there is a kernel, and it beats the others: there are too many pages to work with all of them, but
        not so many that none has two readers.
        """
        count, size = self.k.shape[2:4]
        if not q.shape[1] * min(top_k, count) >= count > DENSE_CHUNKS * top_k or size % (32 // self.k.dtype.itemsize):
            return False
        return platforms.platform_implementation() is not None and q.dtype == self.k.dtype and q.dtype.name in DTYPES

    def _attend(
        self, q: Array, retrieval: Array, visible: VisiblePages, top_k: int, scale: float, implementation: str | None
    ) -> Float[Array, "B C H D"]:
        """The dense or the gathered form."""
        rows, heads, count, size, channels = self.k.shape
        if not count:
            return jnp.zeros_like(q, accumulator(q.dtype))
        top_k = min(top_k, count)
        if count > DENSE_CHUNKS * top_k if implementation is None else implementation == "gathered":
            chosen, weights = self._choices(retrieval, visible, top_k)
            block = max(1, min(QUERY_BLOCK, GATHERED // (rows * heads * top_k * size * channels)))
            return _by_blocks(partial(_gathered, self, scale), block, (q, chosen, weights))

        def attend(q: Array, retrieval: Array, seen: VisiblePages) -> Array:
            return _dense(self, q, retrieval, seen, top_k, scale)

        return _by_blocks(attend, QUERY_BLOCK, (q, retrieval), visible)

    def _choices(
        self, retrieval: Array, visible: VisiblePages, top_k: int
    ) -> tuple[Int32[Array, "B C K top_k"], Float[Array, "B C K top_k"]]:
        """Pages that each query reads, -1 for none, and their weights."""
        rows, heads, count, _ = self.landmarks.shape
        if not count:
            none = jnp.full((rows, retrieval.shape[1], heads, top_k), -1, jnp.int32)
            return none, jnp.zeros_like(none, accumulator(retrieval.dtype))

        def best(retrieval: Array, seen: VisiblePages) -> tuple[Array, Array]:
            chosen, weights = choose(self.landmarks, retrieval, seen, min(top_k, count))
            chosen = jnp.where(weights > 0, chosen, -1)
            return jnp.swapaxes(chosen, 1, 2), jnp.swapaxes(weights, 1, 2)

        chosen, weights = _by_blocks(best, QUERY_BLOCK, (retrieval,), visible)
        missing = ((0, 0), (0, 0), (0, 0), (0, top_k - chosen.shape[3]))
        return jnp.pad(chosen, missing, constant_values=-1), jnp.pad(weights, missing)

    def _parts(
        self, visible: VisiblePages, width: int, start: int | None
    ) -> Iterator[tuple[slice, LandmarkPages, VisiblePages]]:
        """Some queries at a time, with the pages before the last of them; all at once where `start` is None."""
        step = width if start is None else max(-(-width // SPANS), QUERY_BLOCK)
        if start is None or step >= width:
            yield slice(None), self, visible
            return
        for low in range(0, width, step):
            at = slice(low, min(low + step, width))
            count = min((start + at.stop - 1) // self.k.shape[3], self.k.shape[2])
            seen = dataclasses.replace(
                visible,
                number=visible.number[:, :count],
                limit=visible.limit[:, at],
                segments=None if visible.segments is None else visible.segments[:, at],
                of_chunks=None if visible.of_chunks is None else visible.of_chunks[:, :count],
            )
            yield at, jax.tree.map(lambda x, count=count: x[:, :, :count], self), seen


def _by_blocks(
    function: Callable[..., Any], size: int, queries: tuple[Array, ...], visible: VisiblePages | None = None
) -> Any:
    """`function(*queries)`, with `visible` behind them if there is one, for `size` queries at a time.

    Its results have queries second, as its arguments have.
    """
    width, function = queries[0].shape[1], jax.checkpoint(function)
    seen = None if visible is None else (visible.limit, visible.segments)

    def piece(x: tuple[tuple[Array, ...], Any]) -> Any:
        if visible is None:
            return function(*x[0])
        return function(*x[0], dataclasses.replace(visible, limit=x[1][0], segments=x[1][1]))

    if width <= size:
        return piece((queries, seen))
    cut = jax.tree.map(lambda x: cut_blocks(x, size), (queries, seen))
    return jax.tree.map(lambda x: join_blocks(x, width), jax.lax.map(piece, cut))


def _dense(
    chunks: LandmarkPages, q: Array, retrieval: Array, visible: VisiblePages, top_k: int, scale: float
) -> Float[Array, "B C H D"]:
    """Over all pages, those that are not chosen with a weight of zero."""
    dtype, heads = accumulator(q.dtype), chunks.k.shape[1]
    chosen, weights = choose(chunks.landmarks, retrieval, visible, top_k)
    spread = jnp.zeros((*chosen.shape[:-1], chunks.k.shape[2]), dtype)
    spread = jnp.put_along_axis(spread, chosen, weights, axis=-1, inplace=False)
    grouped = rearrange(q, "b c (k g) d -> b k g c d", k=heads)
    logits = jnp.einsum("bkgcd,bkpsd->bkgcps", grouped, chunks.k, preferred_element_type=dtype) * scale
    attention = jax.nn.softmax(logits, axis=-1) * spread[:, :, None, :, :, None]
    out = jnp.einsum("bkgcps,bkpsd->bckgd", attention.astype(q.dtype), chunks.v, preferred_element_type=dtype)
    return rearrange(out, "b c k g d -> b c (k g) d")


def _gathered(
    chunks: LandmarkPages,
    scale: float,
    q: Float[Array, "B C H D"],
    chosen: Int32[Array, "B C K n"],
    weights: Float[Array, "B C K n"],
) -> Float[Array, "B C H D"]:
    """Over the chosen pages alone; those of -1 have no weight."""
    dtype, heads, top_k = accumulator(q.dtype), chunks.k.shape[1], chosen.shape[3]
    flat = rearrange(jnp.maximum(chosen, 0), "b c k n -> b k (c n) 1 1")

    def take(x: Array) -> Array:
        found = jnp.take_along_axis(x, flat, axis=2, mode="clip")
        return rearrange(found, "b k (c n) s d -> b k c n s d", n=top_k)

    grouped = rearrange(q, "b c (k g) d -> b k g c d", k=heads)
    logits = jnp.einsum("bkgcd,bkcnsd->bkgcns", grouped, take(chunks.k), preferred_element_type=dtype) * scale
    attention = jax.nn.softmax(logits, axis=-1) * rearrange(weights, "b c k n -> b k 1 c n 1")
    out = jnp.einsum("bkgcns,bkcnsd->bckgd", attention.astype(q.dtype), take(chunks.v), preferred_element_type=dtype)
    return rearrange(out, "b c k g d -> b c (k g) d")
