"""Indexes of pages: a small summary of each page's keys, and how well a query's keys might lie in it.

An index is a rule without state: `summarise` says what is kept of a page's keys, `scores` compares queries with what
was kept, in the units of `q . k`. A new index is one small class. Summaries are made of the keys as they are stored.
"""

from __future__ import annotations

import dataclasses
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pallas_kernels.partial import accumulator
from streamjax.attention.dense import FEW_QUERIES
from streamjax.field_checks import Fraction, Size, check_fields

Summary = Any  # a pytree of arrays [B, K, P, ...]


class Index:
    """What `Pages` keeps of each page in order to find it again. Subclasses are frozen dataclasses."""

    def check(self, page_size: int) -> None:
        """Refuse a page size that this index cannot summarise.

        Raises:
          ValueError: such a size.
        """

    @property
    def needs_scores(self) -> bool:
        """Whether `summarise` wants the attention that tokens got before they came into a page."""
        return False

    @property
    def reads_keys(self) -> bool:
        """Whether `scores` takes the pages themselves, (keys, valid) as `summarise` does, in place of a summary."""
        return False

    def summarise(
        self,
        keys: Float[Array, "B K P S D"],
        valid: Bool[Array, "B #K P S"],
        score: Float[Array, "B H P S"] | None = None,
    ) -> Summary:
        """What is kept of P pages; `valid` says which of their slots hold tokens. Anything for a page without any.

        `score` is the attention that each token got, from each query head, where `needs_scores` asks for it.
        """
        raise NotImplementedError

    def scores(self, summary: Summary, q: Float[Array, "B K N D"]) -> Float[Array, "B K N P"]:
        """Scores of each query of a key head for each page, comparable with the logits `q . k` before scaling.

        N counts the query heads of a key head fastest, then the queries.
        """
        raise NotImplementedError

    @property
    def joins(self) -> bool:
        """Whether summaries of neighbouring pages make one of all their tokens, by `joined`."""
        return False

    def joined(self, summary: Summary, held: Bool[Array, "B #K P"], pages: int) -> Summary:
        """The summary of each run of so many pages, of those that are `held`; there are a multiple of it."""
        raise NotImplementedError


def _products(keys: Float[Array, "B K P D"], q: Float[Array, "B K N D"]) -> Float[Array, "B K N P"]:
    dtype, q = accumulator(keys.dtype), q.astype(keys.dtype)
    if q.shape[2] <= FEW_QUERIES:  # keys on the left, as in `attend`: the CPU compiler would transpose them otherwise
        return jnp.swapaxes(jnp.einsum("bkpd,bknd->bkpn", keys, q, preferred_element_type=dtype), 2, 3)
    return jnp.einsum("bknd,bkpd->bknp", q, keys, preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class MinMax(Index):
    """The smallest and the largest value of each channel: no key of the page has a larger logit than the score.

    Quest (2406.10774), equation 2. `parts` cuts a page into as many runs of tokens with bounds of their own, of which
    the best counts: LServe's logical pages (2502.14866, section 3.5), tight bounds for large pages.
    """

    parts: Size = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, page_size: int) -> None:
        if page_size % self.parts:
            raise ValueError(f"MinMax.parts must divide the page size {page_size}, got {self.parts}")

    def summarise(
        self,
        keys: Float[Array, "B K P S D"],
        valid: Bool[Array, "B #K P S"],
        score: Float[Array, "B H P S"] | None = None,
    ) -> Summary:
        keys, valid = (
            rearrange(x, "b k p (n s) ... -> b k (p n) s ...", n=self.parts) for x in (keys, valid[..., None])
        )
        high = jnp.max(jnp.where(valid, keys, -jnp.inf), axis=3)
        low = jnp.min(jnp.where(valid, keys, jnp.inf), axis=3)
        some = valid.any(axis=3)
        bounds = jnp.stack((jnp.where(some, high, 0), jnp.where(some, low, 0)), axis=3)
        bounds = rearrange(bounds, "b k (p n) two d -> b k p (n two d)", n=self.parts)
        return bounds, rearrange(some[..., 0], "b k (p n) -> b k p n", n=self.parts)

    def scores(self, summary: Summary, q: Float[Array, "B K N D"]) -> Float[Array, "B K N P"]:
        bounds, some = summary
        # max(q * high, q * low) is q * high for a positive q, q * low for a negative one: one product, twice as wide
        sides = jnp.concatenate((jnp.maximum(q, 0), jnp.minimum(q, 0)), axis=-1)
        found = _products(rearrange(bounds, "b k p (n d) -> b k (p n) d", n=self.parts), sides)
        found = rearrange(found, "b k n (p parts) -> b k n p parts", parts=self.parts)
        return jnp.max(jnp.where(some[:, :, None], found, -jnp.inf), axis=-1)


@dataclasses.dataclass(frozen=True)
class BlendedBounds(Index):
    """Between the largest and the smallest value of each channel, `high` of the way up: one product scores a page.

    MPCache (2501.06807, section 4.3) blends Quest's bounds, so that no comparison depends on the query's signs.
    """

    high: Fraction = 0.6

    def __post_init__(self) -> None:
        check_fields(self)

    def summarise(
        self,
        keys: Float[Array, "B K P S D"],
        valid: Bool[Array, "B #K P S"],
        score: Float[Array, "B H P S"] | None = None,
    ) -> Summary:
        return MinMax().summarise(keys, valid)

    def scores(self, summary: Summary, q: Float[Array, "B K N D"]) -> Float[Array, "B K N P"]:
        bounds, some = summary
        found = _products(bounds, jnp.concatenate((self.high * q, (1 - self.high) * q), axis=-1))
        return jnp.where(some[:, :, None, :, 0], found, -jnp.inf)

    @property
    def joins(self) -> bool:
        return True

    def joined(self, summary: Summary, held: Bool[Array, "B #K P"], pages: int) -> Summary:
        summary = summary[0], summary[1] & held[..., None]
        bounds, some = (rearrange(x, "b k (p n) ... -> b k p n ...", n=pages) for x in summary)
        high, low = jnp.split(bounds, 2, axis=-1)
        high, low = (
            jnp.max(jnp.where(some, high, -jnp.inf), axis=3),
            jnp.min(jnp.where(some, low, jnp.inf), axis=3),
        )
        there = some.any(axis=3)
        return jnp.where(there, jnp.concatenate((high, low), axis=-1), 0), there


@dataclasses.dataclass(frozen=True)
class Mean(Index):
    """The mean of a page's keys, times its number of tokens to the power `power`.

    With `power=0.5` it is DHSA's length-normalised chunk mean (2510.24606, section 3.2), which does not favour pages
    that are not full yet as a mean does nor full ones as a sum would.
    """

    power: Fraction = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    def summarise(
        self,
        keys: Float[Array, "B K P S D"],
        valid: Bool[Array, "B #K P S"],
        score: Float[Array, "B H P S"] | None = None,
    ) -> Summary:
        dtype = accumulator(keys.dtype)
        count = jnp.maximum(jnp.sum(valid, axis=3, dtype=dtype), 1)[..., None]
        total = jnp.sum(jnp.where(valid[..., None], keys, 0), axis=3, dtype=dtype)
        return (total * count ** (self.power - 1)).astype(keys.dtype)

    def scores(self, summary: Summary, q: Float[Array, "B K N D"]) -> Float[Array, "B K N P"]:
        return _products(summary, q)


@dataclasses.dataclass(frozen=True)
class Representative(Index):
    """The mean of the `count` keys of a page that got most attention, for each query head (InfLLM, 2402.04617).

    The paper sums the logits of the queries that follow a token; its published code, as here, sums their attention.
    """

    count: Size = 4

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_scores(self) -> bool:
        return True

    def check(self, page_size: int) -> None:
        if not 1 <= self.count <= page_size:
            raise ValueError(f"Representative.count must be in 1 .. {page_size}, the page size, got {self.count}")

    def summarise(
        self,
        keys: Float[Array, "B K P S D"],
        valid: Bool[Array, "B #K P S"],
        score: Float[Array, "B H P S"] | None = None,
    ) -> Summary:
        assert score is not None, "a tier with this index says that it needs scores"
        group = score.shape[1] // keys.shape[1]
        ranked = jnp.where(valid[:, :, None], rearrange(score, "b (k g) p s -> b k g p s", g=group), -jnp.inf)
        best, chosen = jax.lax.top_k(ranked, self.count)  # [B, K, G, P, count]
        some = ~jnp.isneginf(best)
        # a selection by products: which of a page's slots are among the best, as weights of a mean
        picked = jax.nn.one_hot(chosen, keys.shape[3], dtype=keys.dtype) * some[..., None].astype(keys.dtype)
        weights = jnp.sum(picked, axis=-2) / jnp.maximum(jnp.sum(some, axis=-1, keepdims=True), 1).astype(keys.dtype)
        dtype = accumulator(keys.dtype)
        means = jnp.einsum("bkgps,bkpsd->gbkpd", weights, keys, preferred_element_type=dtype).astype(keys.dtype)
        return tuple(means)  # one array a query head: a product with each reads it as it lies

    def scores(self, summary: Summary, q: Float[Array, "B K N D"]) -> Float[Array, "B K N P"]:
        queries = rearrange(q, "b k (c g) d -> g b k c d", g=len(summary))
        found = [_products(means, mine) for means, mine in zip(summary, queries, strict=True)]
        return rearrange(jnp.stack(found), "g b k c p -> b k (c g) p")


@dataclasses.dataclass(frozen=True)
class Middle(Index):
    """The key in the middle of those that the page holds: it stands for a range of keys in HiP (2406.09827)."""

    def summarise(
        self,
        keys: Float[Array, "B K P S D"],
        valid: Bool[Array, "B #K P S"],
        score: Float[Array, "B H P S"] | None = None,
    ) -> Summary:
        first, held = jnp.argmax(valid, axis=-1), jnp.sum(valid, axis=-1)
        place = jnp.broadcast_to(first + held // 2, keys.shape[:3])[..., None, None]
        return jnp.take_along_axis(keys, jnp.minimum(place, keys.shape[3] - 1), axis=3)[:, :, :, 0]

    def scores(self, summary: Summary, q: Float[Array, "B K N D"]) -> Float[Array, "B K N P"]:
        return _products(summary, q)


@dataclasses.dataclass(frozen=True)
class BestKey(Index):
    """The largest product that a query has with a key of the page: exact, and all keys are read for it.

    Pages of one token with it are top-k attention (2106.06899). Nothing is kept beside the keys.
    """

    @property
    def reads_keys(self) -> bool:
        return True

    def summarise(
        self,
        keys: Float[Array, "B K P S D"],
        valid: Bool[Array, "B #K P S"],
        score: Float[Array, "B H P S"] | None = None,
    ) -> Summary:
        return ()

    def scores(self, summary: Summary, q: Float[Array, "B K N D"]) -> Float[Array, "B K N P"]:
        keys, valid = summary
        size = keys.shape[3]
        if q.shape[2] <= FEW_QUERIES:  # keys as they lie: to put them in another order costs more than the product
            found = _products(rearrange(keys, "b k p s d -> b k (p s) d"), q)
            found = rearrange(found, "b k n (p s) -> b k n p s", s=size)
            return jnp.max(jnp.where(valid[:, :, None], found, -jnp.inf), axis=-1)
        # Slot by slot: a maximum over the few of a page that lie side by side takes the CPU compiler longer.
        found = _products(rearrange(keys, "b k p s d -> b k (s p) d"), q)
        found = rearrange(found, "b k n (s p) -> b k s n p", s=size)
        slots = (jnp.where(valid[:, :, None, :, i], found[:, :, i], -jnp.inf) for i in range(size))
        return reduce(jnp.maximum, slots)
