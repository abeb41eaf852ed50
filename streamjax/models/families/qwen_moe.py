"""Qwen2-MoE, which Qwen1.5-MoE is one of, and Qwen3-MoE (2407.10671, 2505.09388): Qwen with experts in most layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from streamjax.models.config import BlockConfig, DenseConfig, ExpertsConfig, ModelConfig, UniformConfig
from streamjax.models.config.dense import Activation
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.experts_fields import read_experts, with_mlps, without_experts
from streamjax.models.families.family import Family, Source, Table
from streamjax.models.families.llama import read_positions, read_shapes, write_positions, write_shapes
from streamjax.models.families.window_fields import read_layer_types, read_uniform, write_layer_types, write_uniform

_MLP = f"{tensor_tables.BLOCK}.mlp"


def read_qwen_experts(
    fields: Fields, count: int, each: int, width: int, activation: Activation, normalize: bool = False
) -> ExpertsConfig:
    """The experts; the numbers are what a silent config means, and so is whether weights are normalised."""
    fields.defaults = {"moe_intermediate_size": width}
    return read_experts(
        fields,
        count=count,
        each=each,
        width="moe_intermediate_size",
        normalize=fields.flag("norm_topk_prob", normalize),
        activation=activation,
    )


def sparse_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers have experts: those that the config does not name as dense."""
    step, dense = fields.integer("decoder_sparse_step", 1), fields.get("mlp_only_layers", list, None) or []
    if not all(type(layer) is int and layer >= 0 for layer in dense):
        raise ValueError(f"field 'mlp_only_layers' is {dense!r:.80}; expected indices of layers")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]


def _with_experts(fields: Fields, config: UniformConfig, experts: ExpertsConfig) -> ModelConfig:
    mlp = DenseConfig(config.mlp_dim, activation=config.activation)
    return with_mlps(config, [experts if one else mlp for one in sparse_layers(fields, config.num_layers)])


def _write(flat: UniformConfig, experts: ExpertsConfig, sparse: list[bool]) -> dict[str, Any]:
    return {
        **write_shapes(flat),
        **write_positions(flat),
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.mlp_dim,
        "norm_topk_prob": experts.normalize_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, one in enumerate(sparse) if not one],
        "use_sliding_window": any(window is not None for window in flat.windows),
    }


def _read2(fields: Fields) -> ModelConfig:
    shapes = read_shapes(fields, kv_heads=16)
    layers, activation = shapes["num_layers"], shapes["activation"]
    window, first = fields.get("sliding_window", int, 4096), fields.integer("max_window_layers", 28, least=0)
    if not fields.flag("use_sliding_window", False):
        window = None
    default = [window is not None and layer % 2 == 0 and layer < first for layer in range(layers)]
    config = UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 32768),
        family="qwen2_moe",
        qkv_bias=fields.flag("qkv_bias", True),
        windows=read_layer_types(fields, layers, window, default),
    )
    experts = read_qwen_experts(fields, 60, 4, 1408, activation)
    shared = DenseConfig(fields.integer("shared_expert_intermediate_size", 5632), activation=activation)
    return _with_experts(fields, config, dataclasses.replace(experts, shared=shared, shared_gate=True))


def _write2(config: ModelConfig) -> dict[str, Any]:
    flat, experts, sparse = without_experts(config)
    width = None if experts.shared is None else experts.shared.mlp_dim
    windows = {**write_layer_types(flat), "max_window_layers": flat.num_layers}
    more = {"qkv_bias": flat.qkv_bias, "shared_expert_intermediate_size": width}
    return {**_write(flat, experts, sparse), **windows, **more}


def _read3(fields: Fields) -> ModelConfig:
    shapes = read_shapes(fields, kv_heads=4)
    bias = fields.flag("attention_bias", False)
    windows = read_uniform(fields, shapes["num_layers"], 4096)
    fields.integer("max_window_layers", 28, least=0)  # plays no part: the window is all layers' or none's
    config = UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 32768),
        family="qwen3_moe",
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        windows=windows if fields.flag("use_sliding_window", False) else (),
    )
    return _with_experts(fields, config, read_qwen_experts(fields, 128, 8, 768, shapes["activation"]))


def _write3(config: ModelConfig) -> dict[str, Any]:
    flat, experts, sparse = without_experts(config)
    return {**_write(flat, experts, sparse), **write_uniform(flat), "attention_bias": flat.qkv_bias}


def _tensors2(block: BlockConfig) -> Table:
    return {**_tensors(block), **mlp_tensors(block)}


def mlp_tensors(block: BlockConfig) -> Table:
    """A dense MLP, or experts with a shared one that has a gate."""
    if not isinstance(block.mlp, ExpertsConfig):
        return {**tensor_tables.gate_up(_MLP), **tensor_tables.down(f"{_MLP}.down_proj")}
    return {
        **_routed(),
        **tensor_tables.gate_up(f"{_MLP}.shared_expert", "layers.mlp.shared"),
        **tensor_tables.down(f"{_MLP}.shared_expert.down_proj", "layers.mlp.shared"),
        "layers.mlp.shared_gate": (Source(f"{_MLP}.shared_expert_gate.weight", "g e -> e g"),),
    }


def _tensors3(block: BlockConfig) -> Table:
    return {**_tensors(block), **tensor_tables.qk_norms(f"{tensor_tables.BLOCK}.self_attn")}


def _tensors(block: BlockConfig) -> Table:
    if not isinstance(block.mlp, ExpertsConfig):
        return tensor_tables.llama(block)
    return {**tensor_tables.without_mlp(block), **_routed()}


def _routed() -> Table:
    return tensor_tables.experts(f"{_MLP}.gate", f"{_MLP}.experts", ("gate_proj", "up_proj", "down_proj"))


def packed_experts() -> Table:
    """The experts as transformers 5 holds them."""
    return tensor_tables.packed_experts(f"{_MLP}.experts")


_PACKED = packed_experts()
QWEN2_MOE = Family("qwen2_moe", ("Qwen2MoeForCausalLM",), ("qwen2_moe",), _read2, _write2, _tensors2, packed=_PACKED)
QWEN3_MOE = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), ("qwen3_moe",), _read3, _write3, _tensors3, packed=_PACKED)
