"""Attention as a token mixer, in its two forms: parallel over a sequence, and streaming over a KV cascade.

A test proves the two equal. The forms share their projections; what differs is where keys and values come from.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, UInt32

from streamjax.attention.context.sequence import Exchange
from streamjax.attention.dispatch import sequence_attention
from streamjax.attention.token_tree import TokenTree
from streamjax.kv.cache import Cache
from streamjax.kv.head_groups import update_in_order
from streamjax.kv.pages.page_pool import PageTables
from streamjax.kv.query import Implementation, KVTokens, Query, State
from streamjax.models.config import AttentionConfig
from streamjax.models.mixers.projections import Projections
from streamjax.models.parameters import zeros
from streamjax.models.rope import make_rotary
from streamjax.parallel.rules import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceContext:
    """Where the tokens of a sequence, or of a stretch of one, stand.

    position: stream positions. segment_ids: tokens see only their own segment. length: tokens of the whole sequence,
    which `dynamic` and `longrope` depend on. before: segment of the token in front of the stretch; None: there is none.
    exchange: how devices that share a sequence come to each other's keys, see `attention.context.sequence`. prefix: the
    tokens that layers of prefix linear attention look at before they read the first; None: there are none.
    """

    position: UInt32[Array, "B T"]
    segment_ids: Int32[Array, "B T"] | None
    length: int = dataclasses.field(metadata={"static": True})
    before: Int32[Array, " B"] | None = None
    exchange: Exchange = dataclasses.field(default="auto", metadata={"static": True})
    prefix: Bool[Array, "B T"] | None = None

    def resets(self) -> Bool[Array, "B T"] | None:
        """The tokens at which another segment begins than that of the token before; None: there is one segment."""
        if self.segment_ids is None:
            return None
        first = self.segment_ids[:, :1] if self.before is None else self.before[:, None]
        return self.segment_ids != jnp.concatenate((first, self.segment_ids[:, :-1]), axis=1)

    @classmethod
    def from_start(cls, rows: int, length: int) -> SequenceContext:
        """Of whole sequences that begin at position 0, one segment each."""
        return cls(jnp.broadcast_to(jnp.arange(length, dtype=jnp.uint32), (rows, length)), None, length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkContext:
    """Where the tokens of one chunk of B streams stand.

    position: uint32 [B, C]. valid: bool [B, C], a prefix of each row. seen: tokens before the chunk, int32 [B],
    saturating. span: positions in use at once, which `dynamic` and `longrope` depend on. differentiable,
    implementation, tables, shared: see `Query`. ids: of the tokens; None where no cache asks for them. head_order:
    which key heads the cache's heads are, see `Cache.renumbered`; the layer's own where None. tree: see `Query`.
    """

    position: UInt32[Array, "B C"]
    valid: Bool[Array, "B C"]
    seen: Int32[Array, " B"]
    span: int = dataclasses.field(metadata={"static": True})
    differentiable: bool = dataclasses.field(default=False, metadata={"static": True})
    ids: Int32[Array, "B C"] | None = None
    implementation: Implementation | None = dataclasses.field(default=None, metadata={"static": True})
    head_order: Int32[Array, " K"] | None = None
    tables: PageTables | None = None
    shared: Any = None
    tree: TokenTree | None = None


class Attention(nnx.Module):
    """Grouped-query attention of one layer."""

    def __init__(self, config: AttentionConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        self.config = config
        self.projections = Projections(config, d_model, key, dtype, gain)
        self.sink_logits = zeros((config.num_heads,), ("heads",), dtype) if config.sink_logits else None

    def learned_sinks(self) -> Float[Array, " H"] | None:
        """Learned logits that stand for no token, one a query head."""
        return None if self.sink_logits is None else self.sink_logits[...]

    def slopes(self) -> Float[Array, " H"] | None:
        """ALiBi slopes, one a query head."""
        slopes = self.config.alibi_slopes
        return jnp.asarray(np.array(slopes, np.float32)) if slopes else None

    def value_outputs(self) -> Float[Array, "K G D E"]:
        """What takes each head's output to `d_model` channels, adapters included."""
        weight = self.projections.out[...].astype(jnp.float32) * self.config.out_scale
        adapter = self.projections.o_lora
        if adapter is None:
            return weight
        return weight + adapter.product().reshape(weight.shape).astype(weight.dtype) * self.config.out_scale

    def parallel(self, x: Float[Array, "B T W"], context: SequenceContext) -> Float[Array, "B T V"]:
        """Attention of a whole sequence to itself."""
        q, k, v, gate = self.projections.split_gated(x)
        out = sequence_attention(
            *self.turned(q, k, v, context),
            self.config.pattern,
            segment_ids=context.segment_ids,
            scale=self.config.softmax_scale,
            softcap=self.config.softcap,
            slopes=self.slopes(),
            sink_logits=self.learned_sinks(),
            exchange=context.exchange,
        )
        return self._handed_on(self.projections.join(out, x.dtype, gate), k, v)

    def project(
        self, x: Float[Array, "B T W"], context: SequenceContext
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Rotated queries and keys, and values: what attention needs of each token by itself."""
        return self.turned(*self.projections.split(x), context)

    def turned(self, q: Array, k: Array, v: Array, context: SequenceContext) -> tuple[Array, Array, Array]:
        q = self._tempered(q, context.position)
        return constrain(self._rotated(q, context), "batch", "length", "heads", "head_dim"), *self._placed(
            k, v, context
        )

    def keys(
        self, x: Float[Array, "B T W"], context: SequenceContext
    ) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Keys and values of `project` alone."""
        return self._placed(*self.projections.keys(x), context)

    def _placed(self, k: Array, v: Array, context: SequenceContext) -> tuple[Array, Array]:
        axes = ("batch", "length", "kv_heads", "head_dim")
        return constrain(self._rotated(k, context), *axes), constrain(v, *axes)

    def _tempered(self, q: Float[Array, "B T H D"], place: Array) -> Float[Array, "B T H D"]:
        """Queries times the factor that grows with their place [B, T]."""
        rule = self.config.temperature
        if rule is None:
            return q
        factor = 1.0 + rule.beta * jnp.log1p(((place + rule.start) // rule.length).astype(jnp.float32))
        return (q * factor[..., None, None]).astype(q.dtype)

    def _rotated(self, x: Array, context: SequenceContext) -> Array:
        if self.config.rope is None:
            return x
        return make_rotary(self.config.rope, self.config.head_dim, context.length)(x, context.position)

    def stream(
        self, x: Float[Array, "B C W"], state: State, cache: Cache, context: ChunkContext
    ) -> tuple[Float[Array, "B C V"], State]:
        """Attention of a chunk to a cascade and to itself; the cascade takes the chunk in."""
        raw_q, raw_k, v, gate = self.projections.split_gated(x)
        if self.config.temperature is not None:
            place = jnp.arange(x.shape[1], dtype=jnp.int32) if context.tree is None else context.tree.depth
            index = context.seen[:, None] + place
            raw_q = self._tempered(raw_q, jnp.minimum(index, cache.span - 1))
        out, state = stream_attention(self, raw_q, raw_k, v, state, cache, context)
        return self._handed_on(self.projections.join(out, x.dtype, gate), raw_k, v), state

    def join(self, heads: Float[Array, "B T H D"], x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """The heads' outputs, taken to `d_model` channels, and what the layer hands on; `x` is the mixer's input."""
        gate = self.projections.split_gated(x)[3] if self.config.output_gate else None
        y = self.projections.join(heads, x.dtype, gate)
        return self._handed_on(y, *self.projections.keys(x)) if self.config.hands_on_keys else y

    def _handed_on(self, y: Array, k: Float[Array, "B T K D"], v: Float[Array, "B T K D"]) -> Float[Array, "B T V"]:
        """The layer's result and, where layers above read them, its keys before they rotate, and its values."""
        if not self.config.hands_on_keys:
            return y
        return jnp.concatenate((y, *(rearrange(part, "b t k d -> b t (k d)").astype(y.dtype) for part in (k, v))), -1)


@runtime_checkable
class AttentionMixer(Protocol):
    """What attention in a stream asks of a mixer."""

    config: Any

    def slopes(self) -> Float[Array, " H"] | None: ...

    def learned_sinks(self) -> Float[Array, " H"] | None: ...

    def value_outputs(self) -> Float[Array, "K G V E"]: ...


def stream_attention(
    mixer: AttentionMixer,
    raw_q: Float[Array, "B C H D"],
    raw_k: Float[Array, "B C K D"],
    v: Float[Array, "B C K V"],
    state: State,
    cache: Cache,
    context: ChunkContext,
) -> tuple[Float[Array, "B C H D"], State]:
    """Attention of a chunk to a cascade and to itself, from queries and keys that are not rotated; no channels of `v`
    say that keys are values."""
    query, tokens = query_and_tokens(mixer, raw_q, raw_k, v, context, cache.needs_outputs)
    return update_in_order(cache, context.head_order, state, query, tokens)


def query_and_tokens(
    mixer: AttentionMixer,
    raw_q: Float[Array, "B C H D"],
    raw_k: Float[Array, "B C K D"],
    v: Float[Array, "B C K V"],
    context: ChunkContext,
    outputs: bool = False,
) -> tuple[Query, KVTokens]:
    """What a cache is asked about a chunk, and what it is given of it; `outputs`: with what takes values further."""
    config, rotary = mixer.config, None
    if config.rope is not None:
        rotary = make_rotary(config.rope, config.head_dim, context.span)
    q, k = raw_q, raw_k
    if rotary is not None:
        q, k = rotary(raw_q, context.position), rotary(raw_k, context.position)
    tokens = KVTokens(
        k=_heads_first(k),
        v=_heads_first(v),
        raw_k=_heads_first(raw_k),
        position=context.position[:, None],
        valid=context.valid[:, None],
        rotary=rotary,
        ids=None if context.ids is None else context.ids[:, None],
        outputs=mixer.value_outputs() if outputs else None,
    )
    query = Query(
        q=q,
        raw_q=raw_q,
        position=context.position,
        seen=context.seen,
        slopes=mixer.slopes(),
        sink_logits=mixer.learned_sinks(),
        rotary=rotary,
        scale=config.softmax_scale,
        softcap=config.softcap,
        valid=context.valid,
        differentiable=context.differentiable,
        implementation=context.implementation,
        tables=context.tables,
        shared=context.shared,
        tree=context.tree,
    )
    return query, tokens


def _heads_first(x: Float[Array, "B C K D"]) -> Float[Array, "B K C D"]:
    return constrain(jnp.swapaxes(x, 1, 2), "batch", "kv_heads", None, "head_dim")
