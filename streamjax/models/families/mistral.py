"""Mistral (2310.06825): Llama with one sliding window for all layers."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, of_uniform
from streamjax.models.families.llama import read_positions, read_shapes, write_positions, write_shapes
from streamjax.models.families.window_fields import read_uniform, write_uniform


def _read(fields: Fields) -> UniformConfig:
    shapes = read_shapes(fields, kv_heads=8)
    windows = read_uniform(fields, shapes["num_layers"], 4096)
    types = fields.get("layer_types", list, None)
    only = "sliding_attention" if windows else "full_attention"
    if types is not None and any(kind != only for kind in types):
        raise ValueError("field 'layer_types' mixes layers, which the Mistral architecture does not have")
    return UniformConfig(
        **shapes, **read_positions(fields, shapes["head_dim"], 131_072), family="mistral", windows=windows
    )


def _write(config: UniformConfig) -> dict[str, Any]:
    return {**write_shapes(config), **write_positions(config), **write_uniform(config)}


MISTRAL = Family("mistral", ("MistralForCausalLM",), ("mistral",), _read, of_uniform(_write), tensor_tables.llama)
