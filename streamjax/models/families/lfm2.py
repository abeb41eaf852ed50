"""LFM2 (2511.23404), dense and with experts: gated short convolutions in most layers, attention in the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    ExpertsConfig,
    GatedConvConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
)
from streamjax.models.families import recurrent_tables, tensor_tables
from streamjax.models.families.config_fields import Fields, by_layer
from streamjax.models.families.experts_fields import read_experts, the_experts
from streamjax.models.families.family import Family, Source, Table
from streamjax.models.families.llama import check_heads
from streamjax.models.families.rope_fields import read_rope, write_scaling

_LAYER = tensor_tables.BLOCK
_MLP = f"{_LAYER}.feed_forward"
_TYPES = {"conv": True, "full_attention": False}
# Initial weights, and sizes that other fields say too.
_UNUSED = """
    block_dim block_mlp_init_scale block_norm_eps block_out_init_scale block_use_swiglu block_use_xavier_init conv_dim
    conv_dim_out conv_use_xavier_init num_heads theta use_pos_enc
"""


def _read(fields: Fields, family: str, mlps: Sequence[MLPConfig]) -> ModelConfig:
    fields.seen.update(_UNUSED.split())
    d_model, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", 32)
    keys, layers = fields.integer("num_key_value_heads", 8), fields.integer("num_hidden_layers", 32)
    check_heads(d_model, heads)
    check_heads(d_model, keys)
    norm = NormConfig("rms", fields.positive("norm_eps", 1e-5))
    max_position, width = fields.integer("max_position_embeddings", 128_000), d_model // heads
    rope = read_rope(fields, head_dim=width, max_position=max_position, theta=1_000_000.0)
    attention = AttentionConfig(heads, keys, width, rope=rope, qk_norm=norm)
    conv = GatedConvConfig(
        num_heads=keys,
        num_groups=keys,
        channels=d_model // keys,
        conv_width=fields.integer("conv_L_cache", 3),
        bias=fields.flag("conv_bias", False),
    )
    attending = fields.get("full_attn_idxs", list, None)
    attending = range(layers) if attending is None else attending
    default = ["full_attention" if layer in attending else "conv" for layer in range(layers)]
    kinds = by_layer(fields.get("layer_types", list, None) or default, _TYPES, layers)
    tie = fields.flag("tie_word_embeddings", True)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 65536),
        d_model=d_model,
        blocks=tuple(BlockConfig(conv if one else attention, mlp, norm) for one, mlp in zip(kinds, mlps, strict=True)),
        family=family,
        norm=norm,
        tie_embeddings=fields.flag("tie_embedding", tie),
        max_position=max_position,
    )


def _read_dense(fields: Fields) -> ModelConfig:
    width = fields.integer("intermediate_size", 12288)
    width = fields.integer("block_ff_dim", width)
    multiplier, multiple = (
        fields.optional_positive("block_ffn_dim_multiplier", 1.0),
        fields.integer("block_multiple_of", 256),
    )
    if fields.flag("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        if multiplier is not None:
            width = -(-int(multiplier * width) // multiple) * multiple
    return _read(fields, "lfm2", [DenseConfig(width)] * fields.integer("num_hidden_layers", 32))


def _read_experts(fields: Fields) -> ModelConfig:
    layers, dense = fields.integer("num_hidden_layers", 32), fields.integer("num_dense_layers", 2, least=0)
    fields.defaults = {"moe_intermediate_size": 1792}
    experts = read_experts(
        fields,
        count=32,
        each=4,
        width="moe_intermediate_size",
        normalize=fields.flag("norm_topk_prob", True),
        activation="silu",
        counts=("num_experts",),
    )
    experts = dataclasses.replace(
        experts,
        scores="sigmoid",
        selection_bias=fields.flag("use_expert_bias", True),
        weight_scale=fields.positive("routed_scaling_factor", 1.0),
    )
    mlp = DenseConfig(fields.integer("intermediate_size", 7168))
    return _read(fields, "lfm2_moe", [mlp if layer < dense else experts for layer in range(layers)])


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers = [block.mixer for block in config.blocks]
    conv = next((mixer for mixer in mixers if isinstance(mixer, GatedConvConfig)), None)
    attention = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    keys = conv.num_groups if conv is not None else 1
    attention = AttentionConfig(keys, keys, config.d_model // keys) if attention is None else attention
    conv = GatedConvConfig(1, 1, 1) if conv is None else conv
    if attention.rope is None:
        raise ValueError("its attention has no rotation")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "rope_theta": attention.rope.theta,
        "rope_scaling": write_scaling(attention.rope),
        "conv_L_cache": conv.conv_width,
        "conv_bias": conv.bias,
        "layer_types": ["conv" if mixer.recurrent else "full_attention" for mixer in mixers],
    }


def _write_dense(config: ModelConfig) -> dict[str, Any]:
    mlp = config.blocks[0].mlp
    if not isinstance(mlp, DenseConfig):
        raise ValueError("its layers have no dense MLP")
    return {**_write(config), "intermediate_size": mlp.mlp_dim, "block_auto_adjust_ff_dim": False}


def _write_experts(config: ModelConfig) -> dict[str, Any]:
    experts = the_experts(config)
    dense = [block.mlp.mlp_dim for block in config.blocks if isinstance(block.mlp, DenseConfig)]
    return {
        **_write(config),
        "intermediate_size": dense[0] if dense else experts.mlp_dim,
        "moe_intermediate_size": experts.mlp_dim,
        "num_dense_layers": len(dense),
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "norm_topk_prob": experts.normalize_weights,
        "use_expert_bias": experts.selection_bias,
        "routed_scaling_factor": experts.weight_scale,
    }


def _tensors(block: BlockConfig) -> Table:
    attention = f"{_LAYER}.self_attn"
    table = {
        **tensor_tables.embedding_and_head("model.embed_tokens", "model.embedding_norm"),
        **tensor_tables.norm("layers.mixer_norm", f"{_LAYER}.operator_norm"),
        **tensor_tables.norm("layers.mlp_norm", f"{_LAYER}.ffn_norm"),
        **tensor_tables.qkv(block, attention),
        **tensor_tables.out(f"{attention}.out_proj"),
        **tensor_tables.qk_norms(attention, "layernorm"),
    }
    if isinstance(block.mixer, GatedConvConfig):
        table |= recurrent_tables.gated_conv(block.mixer, f"{_LAYER}.conv")
    if isinstance(block.mlp, ExpertsConfig):
        return {
            **table,
            **tensor_tables.experts(f"{_MLP}.gate", f"{_MLP}.experts", ("w1", "w3", "w2")),
            "layers.mlp.selection_bias": (Source(f"{_MLP}.expert_bias", "x -> x"),),
        }
    return {**table, **tensor_tables.gate_up(_MLP, names=("w1", "w3")), **tensor_tables.down(f"{_MLP}.w2")}


LFM2 = Family("lfm2", ("Lfm2ForCausalLM",), ("lfm2",), _read_dense, _write_dense, _tensors)
LFM2_MOE = Family(
    "lfm2_moe",
    ("Lfm2MoeForCausalLM",),
    ("lfm2_moe",),
    _read_experts,
    _write_experts,
    _tensors,
    packed=tensor_tables.packed_experts(f"{_MLP}.experts"),
)
