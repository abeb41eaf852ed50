"""Attention as a token mixer, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from pallas_kernels.patterns import Chunked, Full, Pattern, SinkWindow, SlidingWindow
from streamjax.field_checks import Count, NotNegative, Positive, Size, check_fields
from streamjax.models.config.norm import NormConfig
from streamjax.models.config.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class TemperatureConfig:
    """Sharper attention further on: a query at position p is multiplied by `1 + beta * log(1 + floor(p / length))`.

    Llama 4's rule (2025), which counts positions from `start` 1, and Ministral 3's, which counts from 0. In a stream p
    is the query's place among the positions that its layer has in use at once, as it is for the rotation.
    """

    beta: Positive
    length: Size
    start: Count = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention: `num_heads` query heads and `num_kv_heads` key/value heads of width `head_dim`.

    rope: how queries and keys rotate; None: not at all.
    alibi_slopes: one a query head, as they are added to the scaled logits; empty: no ALiBi.
    window: Hugging Face's `sliding_window`: a key is visible at distance < W; None: full attention.
    sinks: first tokens of the sequence that a window sees too, at their true distance.
    chunk: a query sees the keys of its own chunk alone, chunks being so many tokens from the first one on (Llama 4).
    scale: factor on query-key products; None: 1 / sqrt(head_dim).
    temperature: a factor that grows with the position of the query; None: none.
    softcap: logits become `softcap * tanh(logits / softcap)`.
    qk_norm: of queries and keys, before they rotate.
    qk_norm_over: a head's channels, or those of all heads together (OLMo 2).
    value_norm: of each head's values.
    value_is_key: values are keys before their norm and rotation: one projection makes both (Gemma 4).
    clip_qkv: bound on the values of queries, keys and values.
    sink_logits: each head has a learned logit in its softmax that stands for no token and has no value (gpt-oss).
    output_gate: what a head reads is multiplied by a sigmoid of as many channels, which the token's input makes as it
      makes the query (Qwen3-Next; 2505.06708).
    out_scale: factor on the output (Falcon-H1).
    hands_on_keys: layers above may read its keys and values (Gemma 4 E2B and E4B).
    keys_of: the layer below whose keys and values it reads, having none of its own; None: its own.

    Example:
      >>> attention = sj.AttentionConfig(num_heads=9, num_kv_heads=3, head_dim=64, rope=sj.RopeConfig(theta=100_000.0))
      >>> attention.softmax_scale  # 1 / sqrt(64)
      0.125
    """

    type_name: ClassVar[str] = "attention"
    recurrent: ClassVar[bool] = False
    bounds_shape: ClassVar[tuple[int, ...]] = ()

    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    rope: RopeConfig | None = RopeConfig()
    alibi_slopes: tuple[NotNegative, ...] = ()
    window: Size | None = None
    sinks: Count = 0
    chunk: Size | None = None
    scale: Positive | None = None
    temperature: TemperatureConfig | None = None
    softcap: Positive | None = None
    qk_norm: NormConfig | None = None
    qk_norm_over: Literal["head", "projection"] = "head"
    value_norm: NormConfig | None = None
    value_is_key: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    clip_qkv: Positive | None = None
    sink_logits: bool = False
    output_gate: bool = False
    out_scale: Positive = 1.0
    hands_on_keys: bool = False
    keys_of: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"AttentionConfig.num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.alibi_slopes and len(self.alibi_slopes) != self.num_heads:
            raise ValueError(
                f"AttentionConfig.alibi_slopes has {len(self.alibi_slopes)} entries for {self.num_heads} heads"
            )
        if self.sinks and self.window is None:
            raise ValueError("AttentionConfig.sinks are for layers with a window: full attention sees all tokens")
        if self.chunk is not None and self.window is not None:
            raise ValueError("AttentionConfig.chunk and window are two ways to see less: give one of them")
        if self.qk_norm_over != "head" and self.qk_norm is None:
            raise ValueError(f"AttentionConfig.qk_norm_over is {self.qk_norm_over!r} without a qk_norm: give one")
        if self.keys_of is not None and (self.hands_on_keys or self.value_is_key or self.value_norm is not None):
            raise ValueError("AttentionConfig.keys_of: the layer has no keys and values, so none to hand on or to norm")
        if self.keys_of is not None and self.qk_norm_over != "head":
            raise ValueError("AttentionConfig.keys_of needs qk_norm_over='head': of the queries alone")
        if self.rope is not None:
            self.rope.check_width(self.head_dim)

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_members(self) -> int:
        """Projections of a group that stand before its key: its query heads, each with its gate behind it if it has."""
        return self.group_size * (1 + self.output_gate)

    @property
    def members(self) -> int:
        """Projections of a key/value head's group: those of queries, its key and, if that is another one, its value."""
        return self.query_members + (0 if self.keys_of is not None else 2 - self.value_is_key)

    @property
    def key_channels(self) -> int:
        """Channels of a token's keys and values."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def handed_on(self) -> int:
        """Channels of a token that the layer hands to those above: its keys, before they rotate, and its values."""
        return self.key_channels if self.hands_on_keys else 0

    @property
    def received(self) -> int:
        """Channels of a token that the layer takes of the one below whose keys it reads."""
        return 0 if self.keys_of is None else self.key_channels

    @property
    def softmax_scale(self) -> float:
        """Factor on query-key products."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        """Channels that one norm of queries, and one of keys, is over."""
        queries, keys = (self.num_heads, self.num_kv_heads) if self.qk_norm_over == "projection" else (1, 1)
        return queries * self.head_dim, keys * self.head_dim

    @property
    def pattern(self) -> Pattern:
        """Which keys a query sees."""
        if self.chunk is not None:
            return Chunked(self.chunk)
        if self.window is None:
            return Full()
        return SinkWindow(self.sinks, self.window) if self.sinks else SlidingWindow(self.window)

    @property
    def bound(self) -> tuple[str, int] | None:
        """("chunk", C) or ("window", W), what bounds the keys that a query sees; None: full attention."""
        if self.chunk is not None:
            return "chunk", self.chunk
        return None if self.window is None else ("window", self.window)

    @property
    def reach(self) -> int | None:
        """A key is visible at a distance below this, sinks apart; None: full attention."""
        return self.window if self.chunk is None else self.chunk

    def parameter_count(self, d_model: int) -> int:
        """Number of parameters in a model of `d_model` channels."""
        heads = self.num_kv_heads * self.members
        weights = (heads + self.num_heads) * self.head_dim * d_model
        biases = self.qkv_bias * heads * self.head_dim + self.out_bias * d_model
        weights += self.sink_logits * self.num_heads
        widths = self.qk_norm_widths[: 1 if self.keys_of is not None else 2]
        norms = 0 if self.qk_norm is None else sum(map(self.qk_norm.parameter_count, widths))
        norms += 0 if self.value_norm is None else self.value_norm.parameter_count(self.head_dim)
        return weights + biases + norms
