"""Qwen3.5 (2026), its text: Qwen3-Next's layers with a dense MLP, and the recurrent ones' projections apart.

Of a multimodal checkpoint the text is read. Tokens of text turn by one position in all sections of its rotation, which
is the plain one. The weights of multi-token prediction (`mtp.`) are left alone.
"""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, DenseConfig, ModelConfig, NormConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields
from streamjax.models.families.family import Family, Table
from streamjax.models.families.llama import read_shapes
from streamjax.models.families.qwen3_next import (
    hybrid_tensors,
    read_gated_attention,
    read_gated_delta,
    read_recurrent_layers,
    write_hybrid,
)

_SECTIONS = ("mrope_section", "mrope_interleaved")  # of a rotation's channels, for images


def _read(fields: Fields) -> ModelConfig:
    whole, text = fields, fields
    if fields.get("text_config", dict, None) is not None:
        text = fields.section("text_config")
        whole.seen.update(name for name in fields.values if name.endswith(("_config", "_token_id")))
    text.only("hidden_act", ("silu", "swish"), "silu")
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.values.get(name)
        if isinstance(rope, dict):
            text.values[name] = {key: value for key, value in rope.items() if key not in _SECTIONS}
    shapes = read_shapes(text, head_dim=256, kv_heads=4)
    max_position = text.integer("max_position_embeddings", 32768)
    norm, mlp = NormConfig("rms", shapes["norm_eps"], 1.0), DenseConfig(shapes["mlp_dim"])
    attention = read_gated_attention(text, shapes, norm, max_position)
    delta = read_gated_delta(text, shapes["norm_eps"])
    recurrent = read_recurrent_layers(text, shapes["num_layers"])
    tie = whole.flag("tie_word_embeddings", shapes["tie_embeddings"])
    return ModelConfig(
        vocab_size=shapes["vocab_size"],
        d_model=shapes["d_model"],
        blocks=tuple(BlockConfig(delta if one else attention, mlp, norm) for one in recurrent),
        family="qwen3_5",
        norm=norm,
        tie_embeddings=tie,
        max_position=max_position,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    mlp = config.blocks[0].mlp
    if not isinstance(mlp, DenseConfig):
        raise ValueError("its layers have no dense MLP")
    return {
        **write_hybrid(config),
        "intermediate_size": mlp.mlp_dim,
        "hidden_act": ACTIVATION_NAMES[mlp.activation],
    }


def _tensors(block: BlockConfig) -> Table:
    mlp = f"{tensor_tables.BLOCK}.mlp"
    return {
        **hybrid_tensors(block, apart=True),
        **tensor_tables.gate_up(mlp),
        **tensor_tables.down(f"{mlp}.down_proj"),
    }


QWEN3_5 = Family(
    "qwen3_5",
    ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    ("qwen3_5_text", "qwen3_5"),
    _read,
    _write,
    _tensors,
    renames=tensor_tables.MULTIMODAL_RENAMES,
    ignored=(r"^mtp\.", r"^model\.visual\."),
)
