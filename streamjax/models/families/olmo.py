"""OLMo 2 (2501.00656) and OLMo 3 (2512.13961): norms behind attention and MLP only, and over all queries and keys.

OLMo 3 has windows in three of four layers; `rope_scaling` is about the others.
"""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Table, of_uniform
from streamjax.models.families.llama import check_heads, read_positions, read_shapes, write_positions, write_shapes
from streamjax.models.families.rope_fields import read_layer_ropes, write_scaling
from streamjax.models.families.window_fields import read_layer_types, write_layer_types


def _read_common(fields: Fields) -> dict[str, Any]:
    shapes = read_shapes(fields, norm_eps=1e-5)
    check_heads(shapes["d_model"], shapes["num_heads"])
    bias = fields.flag("attention_bias", False)
    norms = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_over": "projection"}
    return {**shapes, **norms, "qkv_bias": bias, "out_bias": bias}


def _read2(fields: Fields) -> UniformConfig:
    common = _read_common(fields)
    return UniformConfig(**common, **read_positions(fields, common["head_dim"], 2048), family="olmo2")


def _write2(config: UniformConfig) -> dict[str, Any]:
    return {**write_shapes(config), **write_positions(config), "attention_bias": config.qkv_bias}


def _read3(fields: Fields) -> UniformConfig:
    common = _read_common(fields)
    num_layers, max_position = common["num_layers"], fields.integer("max_position_embeddings", 2048)
    theta = fields.positive("rope_theta", 500_000.0)
    rope, local_rope = read_layer_ropes(
        fields, head_dim=common["head_dim"], max_position=max_position, theta=theta, local_theta=theta
    )
    window = fields.get("sliding_window", int, 4096)
    return UniformConfig(
        **common,
        family="olmo3",
        max_position=max_position,
        rope=rope,
        local_rope=local_rope,
        windows=read_layer_types(fields, num_layers, window, [(i + 1) % 4 != 0 for i in range(num_layers)]),
    )


def _write3(config: UniformConfig) -> dict[str, Any]:
    ropes = {"full_attention": config.rope, "sliding_attention": config.local_rope or config.rope}
    parameters = {
        kind: {"rope_type": "default", **(write_scaling(rope) or {}), "rope_theta": rope.theta}
        for kind, rope in ropes.items()
    }
    layers = {**write_layer_types(config, unused=4096), "rope_parameters": parameters}
    return {**write_shapes(config), **layers, "attention_bias": config.qkv_bias}


def _tensors(block: BlockConfig) -> Table:
    return {
        **tensor_tables.llama(block),
        **tensor_tables.norm("layers.mixer_post_norm", f"{tensor_tables.BLOCK}.post_attention_layernorm"),
        **tensor_tables.norm("layers.mlp_post_norm", f"{tensor_tables.BLOCK}.post_feedforward_layernorm"),
        **tensor_tables.qk_norms(f"{tensor_tables.BLOCK}.self_attn"),
    }


OLMO2 = Family("olmo2", ("Olmo2ForCausalLM",), ("olmo2",), _read2, of_uniform(_write2), _tensors)
OLMO3 = Family("olmo3", ("Olmo3ForCausalLM",), ("olmo3",), _read3, of_uniform(_write3), _tensors)
