"""`Retaining`: what a small trained network makes of each token's query, key and value (Locret, 2410.01805)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from pallas_kernels.partial import accumulator
from streamjax.kv.layer_tables import LayerTables
from streamjax.kv.query import KVSpec, KVTokens, Query, State
from streamjax.kv.scores.score import Score


@dataclasses.dataclass(frozen=True, repr=False)
class RetainingHeads(LayerTables):
    """The network of a layer, `silu(x inward) outward`: one number for each key head.

    inward: [(H + 2 K) D, width]. outward: [width, K].
    """


@dataclasses.dataclass(frozen=True)
class Retaining(Score):
    """The largest attention logit that later queries are expected to give a token, told when it comes.

    The network sees a token's queries, keys and values of all heads, before rotation, and nothing else: a token's score
    never changes, and travels with it from tier to tier in the place of a note of attention. The matrices lie in the
    stream's state and not in the program, which layers then share.

    Args:
      heads: of the layer; without them no state can be made.
    """

    needs_attention: ClassVar[bool] = True  # what travels with the tokens is their score
    of_tokens: ClassVar[bool] = True

    heads: RetainingHeads | None = None

    def memory(self, spec: KVSpec) -> State:
        """The matrices, once a stream.

        Raises:
          ValueError: none are given, or those of a layer with other heads.
        """
        if self.heads is None:
            raise ValueError("Retaining() has no heads: train them, python -m train.retaining_heads")
        channels = spec.kv_heads * (spec.group + 2) * spec.head_dim
        (own, _), (_, heads) = self.heads.shapes
        if (own, heads) != (channels, spec.kv_heads):
            found = f"{own} channels and {heads} key heads"
            raise ValueError(f"the retaining heads are of {found}, and the layer has {channels} and {spec.kv_heads}")
        return self.heads.in_state(spec.batch_size, spec.dtype)

    def judged(self, memory: State, query: Query, tokens: KVTokens) -> Float[Array, "B K C"]:
        inward, outward = (x[:, 0] for x in memory)
        k, v = (rearrange(x, "b k c d -> b c k d") for x in (tokens.raw_k, tokens.v))
        return rearrange(retaining_scores(query.raw_q, k, v, inward, outward), "b c k -> b k c")


def retaining_scores(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B C K D"],
    v: Float[Array, "B C K D"],
    inward: Float[Array, "*B I W"],
    outward: Float[Array, "*B W N"],
) -> Float[Array, "B C N"]:
    """What the network says of tokens, from their queries and keys before rotation and their values."""
    line = jnp.concatenate([rearrange(x, "b c h d -> b c (h d)").astype(inward.dtype) for x in (q, k, v)], axis=2)
    wide = accumulator(inward.dtype)
    hidden = jax.nn.silu(jnp.matmul(line, inward, preferred_element_type=wide))
    return jnp.matmul(hidden.astype(outward.dtype), outward, preferred_element_type=wide).astype(jnp.float32)
