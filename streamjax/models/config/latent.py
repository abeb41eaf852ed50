"""Multi-head latent attention as a token mixer, in words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.patterns import Full, Pattern
from streamjax.field_checks import Positive, Size, check_fields
from streamjax.models.config.norm import NormConfig
from streamjax.models.config.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).

    Keys and values of all heads are made from one latent of `kv_rank` channels a token; `rope_dim` more channels of a
    key rotate and are the same for all heads. That is what a cache keeps: one key of `rope_dim + kv_rank` channels.

    num_heads: query heads, each of `nope_dim` channels that do not rotate and `rope_dim` that do.
    value_dim: channels of a head's value.
    q_rank: queries are made from a latent of so many channels; None: from the layer's input.
    rope: how the rotary channels rotate; its `rotary_dim` is `rope_dim`. None: nothing rotates (Kimi-Linear).
    interleaved: rotary channels come in neighbouring pairs (x0, x1), (x2, x3), ... in the weights.
    norm: of the latents.
    scale: factor on query-key products; None: 1 / sqrt(nope_dim + rope_dim).
    """

    type_name: ClassVar[str] = "latent_attention"
    recurrent: ClassVar[bool] = False

    num_heads: Size
    kv_rank: Size
    nope_dim: Size
    rope_dim: Size
    value_dim: Size
    q_rank: Size | None = None
    rope: RopeConfig | None = RopeConfig(rotary_dim=64)
    interleaved: bool = True
    norm: NormConfig = NormConfig(eps=1e-6)
    scale: Positive | None = None

    # What other mixers choose and this one does not have.
    window: ClassVar[None] = None
    chunk: ClassVar[None] = None
    value_is_key: ClassVar[bool] = False
    reach: ClassVar[None] = None
    sinks: ClassVar[int] = 0
    softcap: ClassVar[None] = None
    alibi_slopes: ClassVar[tuple[float, ...]] = ()
    qk_norm: ClassVar[None] = None
    sink_logits: ClassVar[bool] = False
    temperature: ClassVar[None] = None
    hands_on_keys: ClassVar[bool] = False
    keys_of: ClassVar[None] = None
    bounds_shape: ClassVar[tuple[int, ...]] = ()
    handed_on: ClassVar[int] = 0
    received: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rope is not None and self.rope.rotary_dim != self.rope_dim:
            raise ValueError(
                f"LatentAttentionConfig.rope.rotary_dim is {self.rope.rotary_dim}: it must be rope_dim, {self.rope_dim}"
            )
        if self.value_dim > self.query_dim:
            raise ValueError(
                f"LatentAttentionConfig.value_dim is {self.value_dim}: at most nope_dim + rope_dim, {self.query_dim}"
            )
        if self.rope is not None:
            self.rope.check_width(self.query_dim)

    @property
    def query_dim(self) -> int:
        """Channels of a query."""
        return self.nope_dim + self.rope_dim

    @property
    def num_kv_heads(self) -> int:
        """Keys that a cache keeps of a token: one, which is its value too."""
        return 1

    @property
    def head_dim(self) -> int:
        """Channels of a cached key."""
        return self.rope_dim + self.kv_rank

    @property
    def group_size(self) -> int:
        """Query heads of the one key."""
        return self.num_heads

    @property
    def members(self) -> int:
        """Projections of the key's group, as a fused one of plain attention would have them."""
        return self.group_size + 2

    @property
    def softmax_scale(self) -> float:
        """Factor on query-key products."""
        return self.query_dim**-0.5 if self.scale is None else self.scale

    @property
    def pattern(self) -> Pattern:
        """Which keys a query sees: all before it."""
        return Full()

    def parameter_count(self, d_model: int) -> int:
        """Number of parameters in a model of `d_model` channels."""
        queries = self.num_heads * self.query_dim
        queries *= d_model if self.q_rank is None else self.q_rank
        if self.q_rank is not None:
            queries += d_model * self.q_rank + self.norm.parameter_count(self.q_rank)
        keys = d_model * self.head_dim + self.norm.parameter_count(self.kv_rank)
        keys += self.kv_rank * self.num_heads * (self.nope_dim + self.value_dim)
        return queries + keys + self.num_heads * self.value_dim * d_model
