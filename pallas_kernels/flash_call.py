"""What one call of flash attention holds fixed, and what its derivative needs on every platform."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_ranges import Ranges
from pallas_kernels.patterns import Chunked, Pattern
from pallas_kernels.tile_logits import Settings


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static: settings, tokens of a block, queries without padding, how to run; the offset where a kernel needs
    to know it."""

    settings: Settings
    block_q: int
    block_k: int
    queries: int
    interpret: Any
    offset: int | None = None

    @classmethod
    def make(
        cls,
        queries: int,
        keys: int,
        group: int,
        pattern: Pattern,
        block_q: int,
        block_k: int,
        *,
        scale: float,
        softcap: float | None,
        slopes: Any,
        segment_ids: Any,
        interpret: Any,
        offset: int | None = None,
        heads_first: bool = False,
    ) -> Call:
        """From the arguments of `api.flash_attention`; `group` query heads read a key head.

        Raises:
          ValueError: a pattern that no kernel takes.
        """
        if isinstance(pattern, Chunked):
            raise ValueError(f"{pattern}: the kernels take its chunks as rows, with pattern Full(); XLA paths take it")
        settings = Settings(
            scale=float(scale),
            softcap=softcap,
            sinks=min(pattern.sinks, keys),
            window=pattern.window,
            keys=keys,
            ragged=keys % block_k != 0,
            alibi=slopes is not None,
            segmented=segment_ids is not None,
            group=group,
            heads_first=heads_first,
            interpreted=bool(interpret),
        )
        return cls(settings, block_q, block_k, queries, interpret, offset)

    def ranges(self, transposed: bool = False) -> Ranges:
        return Ranges(
            self.queries, self.settings.keys, self.block_q, self.block_k, self.settings.window, transposed=transposed
        )


def safe(lse: jax.Array) -> jax.Array:
    """Log-sum-exps that give queries that see nothing weights of 0."""
    return jnp.where(jnp.isneginf(lse), jnp.inf, lse)


def no_gradient(tree: Any) -> Any:
    """Cotangents of constants."""

    def nothing(x: jax.Array) -> Any:
        return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(nothing, tree)
