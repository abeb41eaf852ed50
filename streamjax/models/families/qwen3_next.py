"""Qwen3-Next (2025): Gated DeltaNet in three of four layers, gated attention in the fourth, experts with a shared one.

The weights of its multi-token prediction (`mtp.`) are left alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    ExpertsConfig,
    GatedDeltaConfig,
    ModelConfig,
    NormConfig,
)
from streamjax.models.families import recurrent_tables, tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields, by_layer
from streamjax.models.families.experts_fields import the_experts
from streamjax.models.families.family import Family, Table
from streamjax.models.families.llama import read_shapes
from streamjax.models.families.qwen_moe import mlp_tensors, packed_experts, read_qwen_experts, sparse_layers
from streamjax.models.families.rope_fields import read_rope, rotary_fraction, write_scaling

LAYER_TYPES = {"linear_attention": True, "full_attention": False}


def read_recurrent_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers are recurrent: by `layer_types`, or all but every so many-th one."""
    types = fields.get("layer_types", list, None)
    interval = fields.integer("full_attention_interval", 4)
    if types is None:
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    return by_layer(types, LAYER_TYPES, num_layers)


def read_gated_delta(fields: Fields, eps: float) -> GatedDeltaConfig:
    """The recurrent layers."""
    return GatedDeltaConfig(
        num_heads=fields.integer("linear_num_value_heads", 32),
        num_groups=fields.integer("linear_num_key_heads", 16),
        key_dim=fields.integer("linear_key_head_dim", 128),
        value_dim=fields.integer("linear_value_head_dim", 128),
        conv_width=fields.integer("linear_conv_kernel_dim", 4),
        norm=NormConfig(eps=eps),
    )


def read_gated_attention(
    fields: Fields, shapes: dict[str, Any], norm: NormConfig, max_position: int
) -> AttentionConfig:
    """The layers that attend."""
    width, bias = shapes["head_dim"], fields.flag("attention_bias", False)
    return AttentionConfig(
        num_heads=shapes["num_heads"],
        num_kv_heads=shapes["num_kv_heads"],
        head_dim=width,
        rope=read_rope(fields, head_dim=width, max_position=max_position, partial=0.25),
        qk_norm=norm,
        qkv_bias=bias,
        out_bias=bias,
        output_gate=True,
    )


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", ("silu", "swish"), "silu")
    shapes = read_shapes(fields, head_dim=256, kv_heads=2)
    max_position = fields.integer("max_position_embeddings", 32768)
    norm, activation = NormConfig("rms", shapes["norm_eps"], 1.0), shapes["activation"]
    attention = read_gated_attention(fields, shapes, norm, max_position)
    delta = read_gated_delta(fields, shapes["norm_eps"])
    experts = read_qwen_experts(fields, 512, 10, 512, activation, normalize=True)
    shared = DenseConfig(fields.integer("shared_expert_intermediate_size", 512), activation=activation)
    experts = dataclasses.replace(experts, shared=shared, shared_gate=True)
    dense = DenseConfig(shapes["mlp_dim"], activation=activation)
    recurrent = read_recurrent_layers(fields, shapes["num_layers"])
    blocks = [
        BlockConfig(delta if one else attention, experts if sparse else dense, norm)
        for one, sparse in zip(recurrent, sparse_layers(fields, shapes["num_layers"]), strict=True)
    ]
    return ModelConfig(
        vocab_size=shapes["vocab_size"],
        d_model=shapes["d_model"],
        blocks=tuple(blocks),
        family="qwen3_next",
        norm=norm,
        tie_embeddings=shapes["tie_embeddings"],
        max_position=max_position,
    )


def write_hybrid(config: ModelConfig) -> dict[str, Any]:
    """The fields of both kinds of layers. A model that has one kind alone cannot say the other's, and need not."""
    blocks = config.blocks
    delta = next((block.mixer for block in blocks if isinstance(block.mixer, GatedDeltaConfig)), None)
    attention = next((block.mixer for block in blocks if isinstance(block.mixer, AttentionConfig)), None)
    delta = GatedDeltaConfig(2, 1, 8, 8) if delta is None else delta
    attention = AttentionConfig(2, 1, 8) if attention is None else attention
    if attention.rope is None:
        raise ValueError("its attention has no rotation")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "attention_bias": attention.qkv_bias,
        "rope_theta": attention.rope.theta,
        "rope_scaling": write_scaling(attention.rope),
        "partial_rotary_factor": rotary_fraction(attention.rope, attention.head_dim),
        "linear_num_value_heads": delta.num_heads,
        "linear_num_key_heads": delta.num_groups,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.conv_width,
        "layer_types": ["linear_attention" if b.mixer.recurrent else "full_attention" for b in blocks],
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    experts = the_experts(config)
    dense = [block.mlp.mlp_dim for block in config.blocks if isinstance(block.mlp, DenseConfig)]
    return {
        **write_hybrid(config),
        "intermediate_size": dense[0] if dense else experts.mlp_dim,
        "hidden_act": ACTIVATION_NAMES[experts.activation],
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.mlp_dim,
        "shared_expert_intermediate_size": None if experts.shared is None else experts.shared.mlp_dim,
        "norm_topk_prob": experts.normalize_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, b in enumerate(config.blocks) if not isinstance(b.mlp, ExpertsConfig)],
    }


def hybrid_tensors(block: BlockConfig, layout: recurrent_tables.Layout) -> Table:
    """All but the MLP; `layout`: see `recurrent_tables.gated_delta`."""
    table = {
        **tensor_tables.without_mlp(block),
        **tensor_tables.qk_norms(f"{tensor_tables.BLOCK}.self_attn"),
    }
    if isinstance(block.mixer, GatedDeltaConfig):
        table |= recurrent_tables.gated_delta(block.mixer, f"{tensor_tables.BLOCK}.linear_attn", layout)
    return table


def _tensors(block: BlockConfig) -> Table:
    return {**hybrid_tensors(block, "grouped"), **mlp_tensors(block)}


QWEN3_NEXT = Family(
    "qwen3_next",
    ("Qwen3NextForCausalLM",),
    ("qwen3_next",),
    _read,
    _write,
    _tensors,
    ignored=(r"^mtp\.",),
    packed=packed_experts(),
)
