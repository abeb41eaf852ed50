"""Scores of pages by the platform's kernel, where one is better than the product that XLA makes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.argument_checks import DTYPES
from streamjax.attention.sharded import per_device_call, splits
from streamjax.kv.pages.indexes import Index, MinMax, Summary
from streamjax.kv.query import Query


def score_pages(index: Index, summary: Summary, query: Query, q: Float[Array, "B K N D"]) -> Float[Array, "B K N P"]:
    """`index.scores(summary, q)`, the queries of `query` by key head; by a TPU's kernel for pages in several parts.

    One product is as good by XLA. Of pages in parts its TPU compiler first makes a copy: all bounds in another order.
    """
    if (
        not (isinstance(index, MinMax) and index.parts > 1)
        or platforms.platform_implementation() != "tpu"
        or query.implementation == "xla"
        or query.differentiable
        or q.dtype != summary[0].dtype
        or q.dtype.name not in DTYPES
        or splits("slots")
    ):
        return index.scores(summary, q)
    bounds, some = summary
    some = jnp.broadcast_to(some, (*bounds.shape[:3], index.parts))

    def own(q: Array, bounds: Array, some: Array) -> Array:
        rows = jnp.swapaxes(q, 1, 2)  # a query head for each key head; all else is one more query
        return api.page_scores(rows, bounds, some, bounds=True, parts=index.parts)

    names = ("batch", "kv_heads", None, None)
    return per_device_call(own, (names,) * 3, names, (q, bounds, some))
