"""GLM-4-0414 (2406.12793 and after): norms before and behind the branches, half of a head rotates, in neighbours."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Table, of_uniform
from streamjax.models.families.llama import read_shapes, write_positions, write_shapes
from streamjax.models.families.rope_fields import read_rope, rotary_fraction


def _read(fields: Fields) -> UniformConfig:
    shapes = read_shapes(fields, head_dim=128, kv_heads=2, norm_eps=1.5625e-7)
    max_position = fields.integer("max_position_embeddings", 131_072)
    return UniformConfig(
        **shapes,
        family="glm4",
        max_position=max_position,
        rope=read_rope(fields, head_dim=shapes["head_dim"], max_position=max_position, partial=0.5),
        post_norms=True,
        qkv_bias=fields.flag("attention_bias", True),
    )


def _write(config: UniformConfig) -> dict[str, Any]:
    fraction = {"partial_rotary_factor": rotary_fraction(config.rope, config.head_dim)}
    return {**write_shapes(config), **write_positions(config), **fraction, "attention_bias": config.qkv_bias}


def _tensors(block: BlockConfig) -> Table:
    mixer = block.attention
    width = mixer.head_dim if mixer.rope is None else mixer.rope.rotary_dim or mixer.head_dim
    return {
        **tensor_tables.llama(block),
        **tensor_tables.qkv(block, f"{tensor_tables.BLOCK}.self_attn", width + width % 2),
        **tensor_tables.norm("layers.mixer_post_norm", f"{tensor_tables.BLOCK}.post_self_attn_layernorm"),
        **tensor_tables.norm("layers.mlp_post_norm", f"{tensor_tables.BLOCK}.post_mlp_layernorm"),
        **tensor_tables.up(f"{tensor_tables.BLOCK}.mlp.gate_up_proj"),
    }


GLM4 = Family("glm4", ("Glm4ForCausalLM",), ("glm4",), _read, of_uniform(_write), _tensors)
