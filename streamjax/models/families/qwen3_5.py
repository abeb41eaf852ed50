"""Qwen3.5 (2026), its text: Qwen3-Next's layers with a dense MLP or experts, the recurrent ones' projections apart.

Of a multimodal checkpoint the text is read. Tokens of text turn by one position in all sections of its rotation, which
is the plain one. The weights of multi-token prediction (`mtp.`) are left alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from streamjax.models.config import BlockConfig, DenseConfig, MLPConfig, ModelConfig, NormConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields
from streamjax.models.families.experts_fields import the_experts
from streamjax.models.families.family import Family, Table
from streamjax.models.families.llama import read_shapes
from streamjax.models.families.qwen3_next import (
    hybrid_tensors,
    read_gated_attention,
    read_gated_delta,
    read_recurrent_layers,
    write_hybrid,
)
from streamjax.models.families.qwen_moe import mlp_tensors, packed_experts, read_qwen_experts

_SECTIONS = ("mrope_section", "mrope_interleaved")  # of a rotation's channels, for images


def _sections(fields: Fields) -> tuple[Fields, Fields]:
    """The whole config and its text's, which may be the same."""
    whole, text = fields, fields
    if fields.get("text_config", dict, None) is not None:
        text = fields.section("text_config")
        whole.seen.update(name for name in fields.values if name.endswith(("_config", "_token_id")))
    return whole, text


def _read_dense(fields: Fields) -> ModelConfig:
    whole, text = _sections(fields)
    shapes = read_shapes(text, head_dim=256, kv_heads=4)
    return _read(whole, text, "qwen3_5", shapes, DenseConfig(shapes["mlp_dim"]))


def _read_experts(fields: Fields) -> ModelConfig:
    whole, text = _sections(fields)
    text.values.setdefault("intermediate_size", 1)  # there is no dense layer
    shapes = read_shapes(text, head_dim=256, kv_heads=2)
    experts = read_qwen_experts(text, 256, 8, 512, "silu", normalize=True)
    shared = DenseConfig(text.integer("shared_expert_intermediate_size", 512))
    mlp = dataclasses.replace(experts, shared=shared, shared_gate=True)
    return _read(whole, text, "qwen3_5_moe", shapes, mlp)


def _read(whole: Fields, text: Fields, family: str, shapes: dict[str, Any], mlp: MLPConfig) -> ModelConfig:
    text.only("hidden_act", ("silu", "swish"), "silu")
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.values.get(name)
        if isinstance(rope, dict):
            text.values[name] = {key: value for key, value in rope.items() if key not in _SECTIONS}
    max_position = text.integer("max_position_embeddings", 32768)
    norm = NormConfig("rms", shapes["norm_eps"], 1.0)
    attention = read_gated_attention(text, shapes, norm, max_position)
    delta = read_gated_delta(text, shapes["norm_eps"])
    recurrent = read_recurrent_layers(text, shapes["num_layers"])
    tie = whole.flag("tie_word_embeddings", shapes["tie_embeddings"])
    return ModelConfig(
        vocab_size=shapes["vocab_size"],
        d_model=shapes["d_model"],
        blocks=tuple(BlockConfig(delta if one else attention, mlp, norm) for one in recurrent),
        family=family,
        norm=norm,
        tie_embeddings=tie,
        max_position=max_position,
    )


def _write_dense(config: ModelConfig) -> dict[str, Any]:
    mlp = config.blocks[0].mlp
    if not isinstance(mlp, DenseConfig):
        raise ValueError("its layers have no dense MLP")
    return {
        **write_hybrid(config),
        "intermediate_size": mlp.mlp_dim,
        "hidden_act": ACTIVATION_NAMES[mlp.activation],
    }


def _write_experts(config: ModelConfig) -> dict[str, Any]:
    experts = the_experts(config)
    return {
        **write_hybrid(config),
        "hidden_act": ACTIVATION_NAMES[experts.activation],
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.mlp_dim,
        "shared_expert_intermediate_size": None if experts.shared is None else experts.shared.mlp_dim,
    }


def _tensors(block: BlockConfig) -> Table:
    return {**hybrid_tensors(block, "apart"), **mlp_tensors(block)}


_IGNORED = (r"^mtp\.", r"^model\.visual\.")


QWEN3_5 = Family(
    "qwen3_5",
    ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    ("qwen3_5_text", "qwen3_5"),
    _read_dense,
    _write_dense,
    _tensors,
    renames=tensor_tables.MULTIMODAL_RENAMES,
    ignored=_IGNORED,
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe",
    ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    ("qwen3_5_moe_text", "qwen3_5_moe"),
    _read_experts,
    _write_experts,
    _tensors,
    renames=tensor_tables.MULTIMODAL_RENAMES,
    ignored=_IGNORED,
    packed=packed_experts(),
)
