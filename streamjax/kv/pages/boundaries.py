"""Where a page of `ContentPages` ends: rules that look at what the tokens are.

A rule is static. It takes a mark of every token, and says by the marks of a page's last tokens and of the next token
whether the page ends between them. Only what lies before a token decides, so that a stream can be cut anywhere. A new
rule is one small class.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Shaped

from pallas_kernels.partial import accumulator
from streamjax.field_checks import Count, Interval, Size, check_fields
from streamjax.kv.query import KVSpec, KVTokens


class Boundary:
    """A rule for where pages end. Subclasses are frozen dataclasses.

    `least` is how many tokens a page has before it may end, `look_back` how many of its last tokens the rule looks at.
    """

    least: int

    @property
    def look_back(self) -> int:
        raise NotImplementedError

    @property
    def needs_ids(self) -> bool:
        """Whether `marks` wants the ids of tokens."""
        return False

    def check(self, page_size: int) -> None:
        """Refuse a page size that this rule cannot work with.

        Raises:
          ValueError: such a size.
        """
        if not 1 <= self.least <= page_size:
            name = type(self).__name__
            raise ValueError(f"{name}.least must be in 1 .. {page_size}, the page size, got {self.least}")

    def init(self, spec: KVSpec) -> Shaped[Array, "B #K L ..."]:
        """Marks of `look_back` tokens that there are not."""
        raise NotImplementedError

    def marks(self, tokens: KVTokens) -> Shaped[Array, "B #K C ..."]:
        """What the rule keeps of each token."""
        raise NotImplementedError

    def page_ends(self, marks: Shaped[Array, "B #K T ..."]) -> Bool[Array, "B C L"]:
        """Whether a page ends before each of C tokens, if it has 1, 2, ... `look_back` or more tokens.

        `marks` are of T = `look_back` + C tokens: those before them, and theirs.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class KeyChange(Boundary):
    """A page ends where keys change direction: before a token whose key is unlike the keys of the page's last tokens.

    Compared are the keys before rotation, of all heads together: the cosine between the token's key and the mean of
    the page's last `context` keys is below `threshold`. Without training, what DHSA learns to predict (2510.24606).

    Raises:
      ValueError: a context below 1, a threshold that no cosine can be below or that is above all.
    """

    threshold: Annotated[float, Interval(-1, 1)] = 0.5
    context: Size = 8
    least: Size = 1

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def look_back(self) -> int:
        return self.context

    def init(self, spec: KVSpec) -> Shaped[Array, "B K L D"]:
        return spec.buffer(self.context)

    def marks(self, tokens: KVTokens) -> Shaped[Array, "B K C D"]:
        # Turned back: tiers hand on the keys that they store, which are rotated.
        return jax.lax.stop_gradient(tokens.moved(back=True).k)

    def page_ends(self, marks: Shaped[Array, "B K T D"]) -> Bool[Array, "B C L"]:
        keys = rearrange(marks, "b k t d -> b t (k d)").astype(accumulator(marks.dtype))
        width = keys.shape[1] - self.context
        new = keys[:, self.context :]
        length = jnp.sum(new * new, axis=-1)

        def compare(total: Array, back: Array) -> tuple[Array, Array]:
            """With the sum of so many last keys, which has the direction of their mean."""
            total = total + jax.lax.dynamic_slice_in_dim(keys, self.context - back, width, axis=1)
            both = jnp.sqrt(jnp.sum(total * total, axis=-1) * length)
            return total, jnp.sum(total * new, axis=-1) < self.threshold * both

        found = jax.lax.scan(compare, jnp.zeros_like(new), jnp.arange(1, self.context + 1))[1]
        return jnp.moveaxis(found, 0, -1)


@dataclasses.dataclass(frozen=True)
class EndTokens(Boundary):
    """A page ends behind a token with one of these `ids`, such as the full stop: SentenceKV's sentences (2504.00970).

    Raises:
      ValueError: no ids, or something else than a tuple of them.
    """

    ids: tuple[Count, ...]
    least: Size = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.ids:
            raise ValueError(f"EndTokens.ids must be a tuple of token ids, such as (46, 33, 63), got {self.ids!r}")

    @property
    def look_back(self) -> int:
        return 1

    @property
    def needs_ids(self) -> bool:
        return True

    def init(self, spec: KVSpec) -> Shaped[Array, "B 1 L"]:
        return jnp.zeros((spec.batch_size, 1, 1), bool)

    def marks(self, tokens: KVTokens) -> Shaped[Array, "B 1 C"]:
        """Which tokens end a page.

        Raises:
          ValueError: tokens come without ids.
        """
        if tokens.ids is None:
            raise ValueError(
                "EndTokens needs the ids of tokens, and they came without: only streams of tokens have ids"
            )
        return jnp.isin(tokens.ids, jnp.array(self.ids, jnp.int32))

    def page_ends(self, marks: Shaped[Array, "B 1 T"]) -> Bool[Array, "B C L"]:
        return marks[:, 0, :-1, None]
