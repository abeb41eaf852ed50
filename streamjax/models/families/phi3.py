"""Phi-3 (2404.14219): fused projections, a rotated part of each head, LongRoPE."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Source, Table, of_uniform
from streamjax.models.families.llama import read_shapes, write_shapes
from streamjax.models.families.rope_fields import read_rope, rotary_fraction, write_scaling
from streamjax.models.families.window_fields import read_uniform, write_uniform

_ALIASES = {"su": "longrope", "yarn": "longrope"}  # what files of this architecture called it at first


def _read(fields: Fields) -> UniformConfig:
    shapes = read_shapes(fields)
    max_position = fields.integer("max_position_embeddings", 4096)
    rope = read_rope(
        fields,
        head_dim=shapes["head_dim"],
        max_position=max_position,
        partial=1.0,
        original=4096,
        aliases=_ALIASES,
    )
    if rope.kind not in ("default", "longrope"):
        raise ValueError(f"rope_scaling has rope_type {rope.kind!r}; the Phi-3 architecture has default and longrope")
    return UniformConfig(
        **shapes,
        family="phi3",
        max_position=max_position,
        rope=rope,
        windows=read_uniform(fields, shapes["num_layers"], None),
    )


def _write(config: UniformConfig) -> dict[str, Any]:
    rope = config.rope
    scaling = write_scaling(rope)
    if scaling is not None and rope.kind == "longrope":
        del scaling["original_max_position_embeddings"]  # a field of its own here
        if rope.factor * (rope.original_max_position or 0) == config.max_position:
            del scaling["factor"]
        scaling["type"] = scaling.pop("rope_type")
    return {
        **write_shapes(config),
        **write_uniform(config),
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "partial_rotary_factor": rotary_fraction(rope, config.head_dim),
        "original_max_position_embeddings": rope.original_max_position or config.max_position,
    }


def _tensors(block: BlockConfig) -> Table:
    attention, mixer = f"{tensor_tables.BLOCK}.self_attn", block.attention
    group, queries, keys = mixer.group_size, mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    parts = (
        ((0, group), (0, queries)),
        ((group, group + 1), (queries, queries + keys)),
        ((group + 1, group + 2), (queries + keys, queries + 2 * keys)),
    )
    qkv = tuple(Source(f"{attention}.qkv_proj.weight", "(k g d) e -> e k g d", part, rows) for part, rows in parts)
    return {
        **tensor_tables.llama(block),
        "layers.mixer.projections.qkv": qkv,
        **tensor_tables.up(f"{tensor_tables.BLOCK}.mlp.gate_up_proj"),
    }


PHI3 = Family("phi3", ("Phi3ForCausalLM",), ("phi3",), _read, of_uniform(_write), _tensors)
