"""A Transformer whose layers differ in no more than their windows, in one flat list of sizes and switches.

Most published models are such; `configs/` and the families describe them so, and the command line changes a field of
one by its name. `UniformConfig(...).expand()` is the `ModelConfig`; `UniformConfig.from_model_config` goes back.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from streamjax.field_checks import Count, Finite, Interval, NotNegative, Positive, Size, check_fields
from streamjax.models.config.attention import AttentionConfig
from streamjax.models.config.block import BlockConfig
from streamjax.models.config.dense import Activation, DenseConfig
from streamjax.models.config.hierarchical import HSAConfig
from streamjax.models.config.model import ModelConfig
from streamjax.models.config.norm import NormConfig
from streamjax.models.config.rope import RopeConfig

_ENDS = (
    *("vocab_size", "d_model", "family", "hsa", "tie_embeddings", "embedding_scale", "logit_scale", "logit_softcap"),
    *("logit_bias", "max_position", "bos_token_id", "eos_token_ids", "sink_token"),
)


@dataclasses.dataclass(frozen=True)
class UniformConfig:
    """A decoder-only Transformer with equal layers.

    Shapes: `d_model` channels, `num_heads` query heads and `num_kv_heads` key/value heads of width `head_dim`, an MLP
    of width `mlp_dim`, `vocab_size` tokens. `windows` has one entry a layer, Hugging Face's `sliding_window` (a key
    is visible at distance < W) or `None`; an empty tuple means full attention everywhere.

    Example:
      >>> config = sj.UniformConfig(
      ...     vocab_size=259, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128
      ... )
      >>> len(config.expand().blocks)
      2
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
    qk_norm: bool = False  # RMSNorm of queries and keys
    qk_norm_over: Literal["head", "projection"] = "head"  # a head's channels, or all heads' together (OLMo 2)
    pre_norms: bool = True  # norms before attention and MLP
    post_norms: bool = False  # norms after attention and MLP too, before the residual sum (Gemma 2 and 3)
    # Residual layout: "sequential", or attention and MLP both fed by the block's input
    parallel_residual: bool = False
    shared_norm: bool = False  # with parallel_residual: one norm feeds both branches (Falcon 7B)
    residual_scale: Positive = 1.0  # factor on what attention and MLP add (Granite)
    # Projections
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: Activation = "silu"
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
    logit_scale: Positive = 1.0  # before logit_softcap
    logit_softcap: Positive | None = None
    logit_bias: bool = False
    max_position: Size = 2048  # the length the model was trained at; nothing stops there
    bos_token_id: Count | None = None
    eos_token_ids: tuple[Count, ...] = ()
    sink_token: bool = False  # trained with a dedicated first token that serves as attention sink

    def __post_init__(self) -> None:
        check_fields(self)
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"UniformConfig.windows has {len(self.windows)} entries for {self.num_layers} layers; give one a layer"
            )
        if self.position == "alibi" and len(self.alibi_slopes) != self.num_heads:
            raise ValueError(
                f"UniformConfig.alibi_slopes has {len(self.alibi_slopes)} entries for {self.num_heads} heads"
            )
        self.expand()

    def replace(self, **changes: Any) -> UniformConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def parameter_count(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        return self.expand().parameter_count

    def expand(self) -> ModelConfig:
        """The same model as a list of blocks."""
        norm = NormConfig(self.norm, self.norm_eps, self.norm_offset, self.norm == "layer" and self.norm_bias)
        windows = self.windows or (None,) * self.num_layers
        kinds = {window: self._block(window, norm) for window in dict.fromkeys(windows)}
        ends = {name: getattr(self, name) for name in _ENDS}
        return ModelConfig(blocks=tuple(kinds[window] for window in windows), norm=norm, **ends)

    def _block(self, window: int | None, norm: NormConfig) -> BlockConfig:
        rope = self.local_rope if window is not None and self.local_rope else self.rope
        mixer = AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope=rope if self.position == "rope" else None,
            alibi_slopes=self.alibi_slopes if self.position == "alibi" else (),
            window=window,
            sinks=0 if window is None else self.sinks,
            scale=self.attention_scale,
            softcap=self.attention_softcap,
            qk_norm=NormConfig("rms", self.norm_eps, self.norm_offset) if self.qk_norm else None,
            qk_norm_over=self.qk_norm_over,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            clip_qkv=self.clip_qkv,
        )
        return BlockConfig(
            mixer=mixer,
            mlp=DenseConfig(self.mlp_dim, self.gated_mlp, self.activation, self.mlp_bias),
            norm=norm,
            pre_norms=self.pre_norms,
            post_norms=self.post_norms,
            residual="parallel" if self.parallel_residual else "sequential",
            shared_norm=self.shared_norm,
            residual_scale=self.residual_scale,
        )

    @classmethod
    def from_model_config(cls, config: ModelConfig) -> UniformConfig:
        """The flat description of a model.

        Raises:
          ValueError: its layers differ in more than their windows and what windows bring with them, or have parts that
            the flat form has no fields for.
        """
        first = next((block for block in config.blocks if block.mixer.window is None), config.blocks[0])
        local = next((block.mixer for block in config.blocks if block.mixer.window is not None), None)
        mixer, mlp = first.mixer, first.mlp
        if not isinstance(mixer, AttentionConfig):
            raise ValueError("its layers have token mixers that the flat form has no fields for")
        if not isinstance(mlp, DenseConfig):
            raise ValueError("no Transformer with equal layers: the flat form has no fields for experts")
        flat = cls(
            **{name: getattr(config, name) for name in _ENDS},
            num_layers=config.num_layers,
            num_heads=mixer.num_heads,
            num_kv_heads=mixer.num_kv_heads,
            head_dim=mixer.head_dim,
            mlp_dim=mlp.mlp_dim,
            norm=config.norm.kind,
            norm_eps=config.norm.eps,
            norm_offset=config.norm.offset,
            norm_bias=config.norm.bias,
            qk_norm=mixer.qk_norm is not None,
            qk_norm_over=mixer.qk_norm_over,
            pre_norms=first.pre_norms,
            post_norms=first.post_norms,
            parallel_residual=first.residual == "parallel",
            shared_norm=first.shared_norm,
            residual_scale=first.residual_scale,
            qkv_bias=mixer.qkv_bias,
            out_bias=mixer.out_bias,
            mlp_bias=mlp.bias,
            gated_mlp=mlp.gated,
            activation=mlp.activation,
            clip_qkv=mixer.clip_qkv,
            position="alibi" if mixer.alibi_slopes else "rope" if mixer.rope is not None else "none",
            rope=mixer.rope or RopeConfig(),
            local_rope=None if local is None or local.rope == mixer.rope else local.rope,
            alibi_slopes=mixer.alibi_slopes,
            windows=tuple(block.mixer.window for block in config.blocks) if local is not None else (),
            sinks=0 if local is None else local.sinks,
            attention_scale=mixer.scale,
            attention_softcap=mixer.softcap,
        )
        back = flat.expand()
        pairs = zip(back.blocks, config.blocks, strict=True)
        unlike = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
        if unlike is not None:
            raise ValueError(
                f"no Transformer with equal layers: layer {unlike} has what the flat form has no field for"
            )
        if back != config:
            raise ValueError("its ends have what the flat form has no field for")
        return flat
