"""SmolLM3 (Hugging Face, 2025): Llama without positions in every fourth layer (NoPE, 2501.18795)."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import ModelConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family
from streamjax.models.families.llama import check_heads, read_positions, read_shapes, write_positions, write_shapes
from streamjax.models.families.no_position import read_no_rope_layers, with_rope, without_rope
from streamjax.models.families.window_fields import read_layer_types, write_layer_types


def _read(fields: Fields) -> ModelConfig:
    shapes = read_shapes(fields, kv_heads=4, tie=True)
    check_heads(shapes["d_model"], shapes["num_heads"])
    still = read_no_rope_layers(fields, shapes["num_layers"])
    window = fields.get("sliding_window", int, None)
    fields.integer("max_window_layers", 28, least=0)  # Qwen's, and without a meaning here
    if not fields.flag("use_sliding_window", False):
        window = None
    default = [window is not None and marked for marked in still]
    bias = fields.flag("attention_bias", False)
    config = UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 32_768, theta=2_000_000.0),
        family="smollm3",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        windows=read_layer_types(fields, shapes["num_layers"], window, default),
    )
    return without_rope(config.expand(), still)


def _write(config: ModelConfig) -> dict[str, Any]:
    turning, still = with_rope(config)
    flat = UniformConfig.from_model_config(turning)
    layers = write_layer_types(flat)
    return {
        **write_shapes(flat),
        **write_positions(flat),
        **layers,
        "use_sliding_window": layers["sliding_window"] is not None,
        "no_rope_layers": [int(not marked) for marked in still],
        "attention_bias": flat.qkv_bias,
        "mlp_bias": flat.mlp_bias,
    }


SMOLLM3 = Family("smollm3", ("SmolLM3ForCausalLM",), ("smollm3",), _read, _write, tensor_tables.llama)
