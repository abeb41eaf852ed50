"""Mixtral (2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, ModelConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.experts_fields import read_experts, with_mlps, without_experts
from streamjax.models.families.family import Family, Table
from streamjax.models.families.llama import read_positions, read_shapes, write_positions, write_shapes
from streamjax.models.families.window_fields import read_uniform, write_uniform

_MLP = f"{tensor_tables.BLOCK}.block_sparse_moe"


def _read(fields: Fields) -> ModelConfig:
    shapes = read_shapes(fields)
    activation = shapes["activation"]
    experts = read_experts(fields, count=8, each=2, width="intermediate_size", normalize=True, activation=activation)
    config = UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 131_072, theta=1_000_000.0),
        family="mixtral",
        windows=read_uniform(fields, shapes["num_layers"], None),
    )
    return with_mlps(config, [experts] * config.num_layers)


def _write(config: ModelConfig) -> dict[str, Any]:
    flat, experts, _ = without_experts(config)
    return {
        **write_shapes(flat),
        **write_positions(flat),
        **write_uniform(flat),
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
    }


def _tensors(block: BlockConfig) -> Table:
    names = ("w1", "w3", "w2")
    experts = tensor_tables.experts(f"{_MLP}.gate", f"{_MLP}.experts", names)
    return {**tensor_tables.without_mlp(block), **experts}


MIXTRAL = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    ("mixtral",),
    _read,
    _write,
    _tensors,
    renames=((r"\.mlp\.", ".block_sparse_moe."),),
    packed=tensor_tables.packed_experts(f"{_MLP}.experts"),
)
