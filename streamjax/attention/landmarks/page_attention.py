"""Hierarchical sparse attention over pages: choose pages by landmarks, attend inside each, weigh by the choice.

HSA of "Hardware-aligned Hierarchical Sparse Attention" (2504.16795), as HSA-UltraLong (2511.23319) uses it. A page (the
papers' chunk) of S tokens has keys, values and one landmark. A token scores pages by `r = retrieval . landmark /
sqrt(D)`, takes the best `top_k`, attends to each of them by a softmax of its own, and sums the outputs weighted by the
softmax of their scores. So the scores get gradients through the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.api import platforms
from pallas_kernels.partial import accumulator
from streamjax.attention.landmarks import page_forms
from streamjax.attention.landmarks.page_choice import VisiblePages
from streamjax.attention.sharded import per_device_call

Implementation = Literal["dense", "gathered", "pallas"]
SPANS = 8  # parts of a sequence that each work with as many pages as their last query needs
_NAMES = (  # of the dimensions of queries, keys, values, choices and weights
    ("batch", "length", "heads", None),
    *(("batch", "kv_heads", None, None, None),) * 2,
    *(("batch", "length", "kv_heads", None),) * 2,
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
        if implementation is None and page_forms.kernel_pays(q, self.k, self.k.shape[2], top_k):
            platforms.log_choice("hierarchical attention over many chunks", "pallas")
            implementation = "pallas"
        outs, choices = [], []
        for at, pages, seen in self._parts(visible, q.shape[1], start):
            choice = page_forms.choose_in_blocks(pages.landmarks, retrieval[:, at], seen, top_k)
            if implementation == "pallas":
                choices.append(choice)
            else:
                outs.append(pages._attend(q[:, at], *choice, scale, implementation))
        if outs:
            return jnp.concatenate(outs, axis=1)
        chosen, weights = (jnp.concatenate(x, axis=1) for x in zip(*choices, strict=True))
        arrays = q, self.k, self.v, chosen, weights
        return per_device_call(partial(page_forms.attend_by_kernel, scale), _NAMES, _NAMES[0], arrays)

    def _attend(
        self, q: Array, chosen: Array, weights: Array, scale: float, implementation: str | None
    ) -> Float[Array, "B C H D"]:
        """The dense or the gathered form."""
        count, top_k = self.k.shape[2], chosen.shape[3]
        if not count:
            return jnp.zeros_like(q, accumulator(q.dtype))
        few = count <= page_forms.DENSE_CHUNKS * min(top_k, count)
        dense = few if implementation is None else implementation == "dense"
        attend = page_forms.attend_dense if dense else page_forms.attend_gathered
        return attend(scale, q, self.k, self.v, chosen, weights)

    def _parts(
        self, visible: VisiblePages, width: int, start: int | None
    ) -> Iterator[tuple[slice, LandmarkPages, VisiblePages]]:
        """Some queries at a time, with the pages before the last of them; all at once where `start` is None."""
        step = width if start is None else max(-(-width // SPANS), page_forms.QUERY_BLOCK)
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
