"""`Retaining`: what a small trained network makes of each token's query, key and value (Locret, 2410.01805)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.partial import accumulator
from streamjax.field_checks import check_fields
from streamjax.kv.codecs.slots import Slots
from streamjax.kv.query import KVSpec, KVTokens, Query, State
from streamjax.kv.scores.score import Held, Score


@dataclasses.dataclass(frozen=True)
class RetainingHeads:
    """The network of a layer, as bytes that hash once: `silu(x inward) outward`, one number for each key head.

    inward: float32 [(H + 2 K) D, width]. outward: float32 [width, K]. model: a fingerprint of the model that they were
    trained with.
    """

    inward: bytes
    outward: bytes
    width: int
    model: str

    def __repr__(self) -> str:
        return f"RetainingHeads(width {self.width}, of model {self.model})"

    @classmethod
    def from_arrays(
        cls, inward: Float[np.ndarray, "I W"], outward: Float[np.ndarray, "W K"], model: str
    ) -> RetainingHeads:
        """The network of these matrices."""
        found = [np.ascontiguousarray(x, np.float32) for x in (inward, outward)]
        return cls(found[0].tobytes(), found[1].tobytes(), found[1].shape[0], model)

    @property
    def matrices(self) -> tuple[Float[np.ndarray, "I W"], Float[np.ndarray, "W K"]]:
        inward, outward = (np.frombuffer(x, np.float32) for x in (self.inward, self.outward))
        return inward.reshape(-1, self.width), outward.reshape(self.width, -1)


@dataclasses.dataclass(frozen=True)
class Retaining(Score):
    """The largest attention logit that later queries are expected to give a token, told when it comes.

    The network sees a token's queries, keys and values of all heads, before rotation, and nothing else: a token's score
    never changes, and travels with it from tier to tier in the place of a note of attention. The matrices lie in the
    stream's state and not in the program, which layers then share.

    Args:
      heads: of the layer. None: they lie in the state already; no state can be made then.
    """

    needs_attention: ClassVar[bool] = True  # what travels with the tokens is their score
    of_tokens: ClassVar[bool] = True

    heads: RetainingHeads | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def made_for(self) -> str | None:
        return None if self.heads is None else self.heads.model

    def without_numbers(self) -> Retaining:
        return Retaining()

    def memory(self, spec: KVSpec) -> State:
        """The matrices, once a stream.

        Raises:
          ValueError: none are given, or those of a layer with other heads.
        """
        if self.heads is None:
            raise ValueError("Retaining() has no heads: train them, python -m train.retaining_heads")
        inward, outward = self.heads.matrices
        channels = spec.kv_heads * (spec.group + 2) * spec.head_dim
        if inward.shape[0] != channels or outward.shape[1] != spec.kv_heads:
            found = f"{inward.shape[0]} channels and {outward.shape[1]} key heads"
            raise ValueError(f"the retaining heads are of {found}, and the layer has {channels} and {spec.kv_heads}")
        rows = spec.batch_size, 1
        return tuple(jnp.broadcast_to(jnp.asarray(x, spec.dtype), (*rows, *x.shape)) for x in (inward, outward))

    def judged(self, memory: State, query: Query, tokens: KVTokens) -> Float[Array, "B K C"]:
        inward, outward = (x[:, 0] for x in memory)
        k, v = (rearrange(x, "b k c d -> b c k d") for x in (tokens.raw_k, tokens.v))
        return rearrange(retaining_scores(query.raw_q, k, v, inward, outward), "b c k -> b k c")

    def noted(
        self,
        note: Float[Array, "B K S"] | None,
        query: Query,
        k: Slots,
        position: UInt32[Array, "B #K S"],
        valid: Bool[Array, "B #K S"],
        lse: Float[Array, "B C H"],
        reach: int | None = None,
        filled: Int32[Array, " B"] | None = None,
    ) -> Float[Array, "B K S"]:
        """As they were: no query changes what was said of a token."""
        assert note is not None, "a cascade asks for the scores of new tokens by `judged`"
        return note

    def rank(self, held: Held) -> Float[Array, "B K S"]:
        assert held.note is not None
        return held.note


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
