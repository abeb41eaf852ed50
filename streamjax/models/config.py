"""What a decoder is: one frozen, hashable description that covers every architecture the library loads.

A `ModelConfig` holds shapes and choices, never arrays. `families.py` makes one from a Hugging Face `config.json`;
`decoder.py` builds the model that it describes.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pallas_kernels.patterns import Full, Pattern, SinkWindow, SlidingWindow
from streamjax.field_checks import Count, Finite, Interval, NotNegative, Positive, Size, check_fields, from_plain

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, width and one of the published ways to scale it to longer contexts.

    `rotary_dim` is the number of leading channels of a head that rotate (`None`: all of them); an odd one rotates one
    channel more, at the frequencies of the odd width, as GPT-NeoX does. Fields that a kind does not use play no part.
    Names follow Hugging Face's `rope_scaling`, whose meaning they have.
    """

    theta: Annotated[float, Interval(1, above=True)] = 10_000.0
    rotary_dim: Size | None = None
    kind: RopeKind = "default"
    factor: Positive = 1.0
    original_max_position: Size | None = None
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    attention_factor: Positive | None = None
    short_factor: tuple[Positive, ...] = ()
    long_factor: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind in ("dynamic", "llama3", "yarn", "longrope") and self.original_max_position is None:
            raise ValueError(f"RopeConfig.kind {self.kind!r} needs a positive original_max_position")
        if self.rotary_dim is not None and self.rotary_dim % 2 and self.kind == "yarn":
            raise ValueError(f"RopeConfig.rotary_dim is {self.rotary_dim}: it must be even for yarn")
        for kind, low, high in (("llama3", "low_freq_factor", "high_freq_factor"), ("yarn", "beta_slow", "beta_fast")):
            if self.kind == kind and getattr(self, low) >= getattr(self, high):
                given = f"{getattr(self, low)} and {high} {getattr(self, high)}"
                raise ValueError(f"RopeConfig.{low} is {given}: for {kind} the second must be larger")
        if self.kind == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError("RopeConfig.kind 'longrope' needs short_factor and long_factor, one a channel pair")


@dataclasses.dataclass(frozen=True)
class HSAConfig:
    """Hierarchical sparse attention (2504.16795; HSA-UltraLong, 2511.23319): which layers remember, which read.

    The inputs of the layers in `memory_layers` are cut into chunks of `chunk_size` tokens, which a bidirectional
    encoder of `encoder_layers` layers turns into keys, values and landmarks. Every layer in `layers` reads, behind its
    own attention, the `top_k` best chunks of the memory of the last memory layer at or below it.
    `memory_layers=(L / 2,)` and some of the upper layers is HSA-UltraLong's shape; `memory_layers == layers` gives each
    reading layer a memory of its own.
    """

    layers: tuple[Count, ...]
    memory_layers: tuple[Count, ...]
    chunk_size: Size = 64
    top_k: Size = 8
    encoder_layers: Size = 1

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("layers", "memory_layers"):
            value = getattr(self, name)
            if not value or list(value) != sorted(set(value)):
                raise ValueError(f"HSAConfig.{name} must name layers in order, got {value!r}")
        if self.layers[0] < self.memory_layers[0]:
            raise ValueError(
                f"HSAConfig.layers begin at {self.layers[0]}, below the first of memory_layers, {self.memory_layers[0]}"
            )


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What distinguishes one layer from its neighbours: its sliding window (`None`: full attention) and its RoPE.

    `sinks` first tokens of the sequence are seen by a layer with a window too, at their true distance. `remembers`: its
    input becomes a chunk memory; `reads`: it attends to one (`HSAConfig`).
    """

    window: int | None
    rope: RopeConfig | None
    sinks: int = 0
    remembers: bool = False
    reads: bool = False

    @property
    def pattern(self) -> Pattern:
        """Which keys a query sees."""
        if self.window is None:
            return Full()
        return SinkWindow(self.sinks, self.window) if self.sinks else SlidingWindow(self.window)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer. Every field is static; two equal configs compile to the same program.

    Shapes: `d_model` channels, `num_heads` query heads and `num_kv_heads` key/value heads of width `head_dim`, an MLP
    of width `mlp_dim`, `vocab_size` tokens. `windows` has one entry a layer, Hugging Face's `sliding_window` (a key
    is visible at distance < W) or `None`; an empty tuple means full attention everywhere.
    """

    vocab_size: Size
    d_model: Size
    num_layers: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    mlp_dim: Size
    family: str = "llama"
    # Normalisation
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: Annotated[float, Interval(0, 1, above=True)] = 1e-5
    norm_offset: Finite = 0.0  # added to the stored weight: 1.0 for Gemma
    norm_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's queries and keys
    post_norms: bool = False  # norms after attention and MLP too, before the residual sum (Gemma 2 and 3)
    # Residual layout: "sequential", or attention and MLP both fed by the block's input
    parallel_residual: bool = False
    shared_norm: bool = False  # with parallel_residual: one norm feeds both branches (Falcon 7B)
    # Projections
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    clip_qkv: Positive | None = None
    # Positions
    position: Literal["rope", "alibi", "none"] = "rope"
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None  # for layers with a window, where it differs (Gemma 3)
    alibi_slopes: tuple[NotNegative, ...] = ()  # one a query head, as they are added to the scaled logits
    # Attention
    windows: tuple[Size | None, ...] = ()
    sinks: Count = 0  # first tokens of the sequence that layers with a window see too, at their true distance
    attention_scale: Positive | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: Positive | None = None
    hsa: HSAConfig | None = None
    # Ends
    tie_embeddings: bool = False
    embedding_scale: Positive = 1.0
    logit_softcap: Positive | None = None
    logit_bias: bool = False
    max_position: Size = 2048  # the length the model was trained at; nothing stops there
    bos_token_id: Count | None = None
    eos_token_ids: tuple[Count, ...] = ()
    sink_token: bool = False  # trained with a dedicated first token that serves as attention sink

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig.num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"ModelConfig.windows has {len(self.windows)} entries for {self.num_layers} layers; give one a layer"
            )
        if self.position == "alibi" and len(self.alibi_slopes) != self.num_heads:
            raise ValueError(
                f"ModelConfig.alibi_slopes has {len(self.alibi_slopes)} entries for {self.num_heads} heads"
            )
        if self.hsa is not None and max(self.hsa.layers + self.hsa.memory_layers) >= self.num_layers:
            raise ValueError(
                f"ModelConfig.hsa names layer {max(self.hsa.layers + self.hsa.memory_layers)} of {self.num_layers}"
            )
        for token in self.eos_token_ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"ModelConfig.eos_token_ids has {token!r}, which is outside the vocabulary of {self.vocab_size}"
                )
        if self.shared_norm and not self.parallel_residual:
            raise ValueError("ModelConfig.shared_norm needs parallel_residual=True")
        for rope in (self.rope, self.local_rope):
            rotary_dim = 0 if rope is None or rope.rotary_dim is None else rope.rotary_dim
            if self.position == "rope" and rotary_dim + rotary_dim % 2 > self.head_dim:
                raise ValueError(f"RopeConfig.rotary_dim {rotary_dim} does not fit in head_dim {self.head_dim}")
        if self.position == "rope" and self.rope.rotary_dim is None and self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim {self.head_dim} is odd: set RopeConfig.rotary_dim to an even width")
        for rope in (self.rope, self.local_rope) if self.position == "rope" else ():
            width = 0 if rope is None else rope.rotary_dim or self.head_dim
            if rope is not None and rope.kind == "dynamic" and width <= 2:
                raise ValueError(f"RopeConfig.kind 'dynamic' needs more than 2 channels that rotate, and has {width}")
            if rope is not None and rope.kind == "longrope":
                self._check_factors(rope, (width + 1) // 2)

    @staticmethod
    def _check_factors(rope: RopeConfig, pairs: int) -> None:
        for name in ("short_factor", "long_factor"):
            if len(getattr(rope, name)) != pairs:
                have = len(getattr(rope, name))
                raise ValueError(f"RopeConfig.{name} has {have} factors: longrope needs {pairs}, one a channel pair")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        """Factor on query-key dot products."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def layer(self, index: int) -> LayerSpec:
        """The window, RoPE and sinks of layer `index`, and its part in hierarchical sparse attention."""
        window = self.windows[index] if self.windows else None
        sinks = 0 if window is None else self.sinks
        rope = self.local_rope if window is not None and self.local_rope else self.rope
        remembers = self.hsa is not None and index in self.hsa.memory_layers
        reads = self.hsa is not None and index in self.hsa.layers
        return LayerSpec(window, rope if self.position == "rope" else None, sinks, remembers, reads)

    @property
    def period(self) -> int:
        """Smallest P such that layer i and layer i + P are alike for every i: the body of a scan over layers."""
        specs = [self.layer(i) for i in range(self.num_layers)]
        return next(p for p in range(1, self.num_layers + 1) if all(s == specs[i % p] for i, s in enumerate(specs)))

    @property
    def repeats(self) -> int:
        """How often the period repeats, as far as layers can be stacked: a scan cannot hand on a chunk memory."""
        return 0 if self.hsa is not None else self.num_layers // self.period

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def parameter_count(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        heads, kv, width, d, f = self.num_heads, self.num_kv_heads, self.head_dim, self.d_model, self.mlp_dim
        norm = d * (1 + (self.norm == "layer" and self.norm_bias))
        attention = d * (heads + 2 * kv) * width + heads * width * d
        attention += self.qkv_bias * (heads + 2 * kv) * width + self.out_bias * d + self.qk_norm * 2 * width
        mlp = (3 if self.gated_mlp else 2) * d * f + self.mlp_bias * (f * (2 if self.gated_mlp else 1) + d)
        norms = (1 if self.shared_norm else 2) + 2 * self.post_norms
        ends = self.vocab_size * d * (1 if self.tie_embeddings else 2) + self.logit_bias * self.vocab_size
        memory = 0
        if self.hsa is not None:
            encoder = self.hsa.encoder_layers * (attention + mlp + 2 * norm) + norm + 3 * d * kv * width + d + width
            memory = len(self.hsa.memory_layers) * encoder
            memory += len(self.hsa.layers) * (norm + d * (heads + kv) * width + heads * width * d + width)
        return self.num_layers * (attention + mlp + norms * norm) + memory + norm + ends

    def to_json_dict(self) -> dict[str, Any]:
        """A dictionary of plain values, from which `from_json_dict` rebuilds the config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild a config that went through JSON; what is no config is a ValueError of one line."""
        return from_plain(cls, values)
