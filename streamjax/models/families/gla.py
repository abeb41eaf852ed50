"""Gated linear attention (2312.06635) as flash-linear-attention has it: no softmax, and a decay for each channel.

Hybrids with attention, short convolutions, feature maps, keys that heads share and decays with a least value are
refused.
"""

from __future__ import annotations

import math
from typing import Any

from streamjax.models.config import BlockConfig, DenseConfig, GatedLinearConfig, ModelConfig, NormConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Source, Table

_ATTENTION = f"{tensor_tables.BLOCK}.attn"
_UNUSED = """
    attn_mode conv_size fuse_cross_entropy fuse_linear_cross_entropy fuse_norm fuse_swiglu use_gk use_l2warp
"""


def _read(fields: Fields) -> ModelConfig:
    fields.seen.update(_UNUSED.split())
    fields.only("hidden_act", ("swish", "silu"), "swish")
    fields.only("use_output_gate", (True,), True)
    fields.only("elementwise_affine", (True,), True)
    for name in ("attn", "feature_map", "clamp_min", "attnres_block_size"):
        fields.only(name, (None,))
    for name in ("use_short_conv", "use_gv"):
        fields.only(name, (False,), False)
    d_model, heads = fields.integer("hidden_size", 2048), fields.integer("num_heads", 4)
    fields.only("num_kv_heads", (None, heads))
    widths = [int(d_model * fields.positive(f"expand_{name}", usual)) for name, usual in (("k", 0.5), ("v", 1.0))]
    if any(width % heads for width in widths):
        raise ValueError(f"keys and values of {widths[0]} and {widths[1]} channels do not divide into {heads} heads")
    hidden = fields.optional_integer("intermediate_size")
    if hidden is None:
        ratio = fields.get("hidden_ratio", (int, float), 4) or 4
        hidden = 256 * math.ceil(int(d_model * ratio * 2 / 3) / 256)
    else:
        fields.seen.add("hidden_ratio")
    norm = NormConfig(eps=fields.positive("norm_eps", 1e-6))
    mixer = GatedLinearConfig(heads, heads, key_dim=widths[0] // heads, value_dim=widths[1] // heads, norm=norm)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 32000),
        d_model=d_model,
        blocks=(BlockConfig(mixer, DenseConfig(hidden), norm),) * fields.integer("num_hidden_layers", 24),
        family="gla",
        norm=norm,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=fields.integer("max_position_embeddings", 2048),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    mixer, mlp = config.blocks[0].mixer, config.blocks[0].mlp
    if not isinstance(mixer, GatedLinearConfig) or not isinstance(mlp, DenseConfig):
        raise ValueError("its layers are not those of gated linear attention with an MLP")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_heads": mixer.num_heads,
        "num_kv_heads": None,
        "expand_k": mixer.num_heads * mixer.key_dim / config.d_model,
        "expand_v": mixer.num_heads * mixer.value_dim / config.d_model,
        "intermediate_size": mlp.mlp_dim,
        "hidden_act": "swish",
        "norm_eps": config.norm.eps,
        "attn": None,
        "attn_mode": "chunk",
        "fuse_norm": True,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
    }


def _tensors(block: BlockConfig) -> Table:
    mixer = block.mixer
    assert isinstance(mixer, GatedLinearConfig)
    ends = [0, mixer.key_dim, 2 * mixer.key_dim, 2 * mixer.key_dim + mixer.value_dim]
    ends.append(ends[-1] + mixer.value_dim)
    parts = zip("qkvg", ends[:-1], ends[1:], strict=True)
    return {
        **tensor_tables.embedding_and_head("model.embeddings", "model.norm"),
        **tensor_tables.norm("layers.mixer_norm", f"{tensor_tables.BLOCK}.attn_norm"),
        **tensor_tables.norm("layers.mlp_norm", f"{tensor_tables.BLOCK}.mlp_norm"),
        **tensor_tables.gate_up(f"{tensor_tables.BLOCK}.mlp"),
        **tensor_tables.down(f"{tensor_tables.BLOCK}.mlp.down_proj"),
        "layers.mixer.inside": tuple(
            Source(f"{_ATTENTION}.{name}_proj.weight", "(k g) e -> e k g", (start, stop)) for name, start, stop in parts
        ),
        "layers.mixer.down": (Source(f"{_ATTENTION}.gk_proj.0.weight", "r e -> e r"),),
        "layers.mixer.up": (Source(f"{_ATTENTION}.gk_proj.1.weight", "(k d) r -> r k d"),),
        "layers.mixer.up_bias": (Source(f"{_ATTENTION}.gk_proj.1.bias", "(k d) -> k d"),),
        "layers.mixer.norm.weight": (Source(f"{_ATTENTION}.g_norm_swish_gate.weight", "d -> d"),),
        "layers.mixer.out": (Source(f"{_ATTENTION}.o_proj.weight", "e (k g d) -> k g d e"),),
    }


GLA = Family(
    "gla",
    ("GLAForCausalLM",),
    ("gla",),
    _read,
    _write,
    _tensors,
    renames=((r"\.g_norm\.weight$", ".g_norm_swish_gate.weight"),),  # the same without a fused kernel
)
