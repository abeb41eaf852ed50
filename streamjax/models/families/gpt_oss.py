"""gpt-oss (2508.10925): experts, windows in every other layer, and a learned sink logit in every head."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, ExpertsConfig, ModelConfig, RopeConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.experts_fields import with_mlps, without_experts
from streamjax.models.families.family import Family, Source, Table
from streamjax.models.families.llama import read_shapes, write_positions, write_shapes
from streamjax.models.families.rope_fields import parse_rope, read_rope
from streamjax.models.families.window_fields import read_layer_types, write_layer_types

_MLP = f"{tensor_tables.BLOCK}.mlp"
_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
_THETA, _WINDOW = 150_000.0, 128


def _read_rope(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """The rotation; where the config is silent, it is YaRN, and not a plain one."""
    found = read_rope(fields, head_dim=head_dim, max_position=max_position, theta=_THETA)
    if fields.values.get("rope_scaling") or fields.values.get("rope_parameters"):
        return found
    return parse_rope(_YARN, head_dim=head_dim, max_position=max_position, theta=found.theta)


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", ("silu",), "silu")
    shapes = read_shapes(fields, head_dim=64, kv_heads=8)
    shapes["norm_eps"] = fields.positive("rms_norm_eps", 1e-5)
    layers, max_position = shapes["num_layers"], fields.integer("max_position_embeddings", 131_072)
    fields.integer("initial_context_length", 1)  # the scaling has it too
    chosen = fields.integer("num_experts_per_tok", 4)
    if fields.integer("experts_per_token", chosen) != chosen:
        raise ValueError("fields 'num_experts_per_tok' and 'experts_per_token' contradict each other")
    bias = fields.flag("attention_bias", True)
    window = fields.get("sliding_window", int, _WINDOW)
    flat = UniformConfig(
        **shapes,
        family="gpt_oss",
        max_position=max_position,
        rope=_read_rope(fields, shapes["head_dim"], max_position),
        qkv_bias=bias,
        out_bias=bias,
        windows=read_layer_types(fields, layers, window, [i % 2 == 0 for i in range(layers)]),
    )
    experts = ExpertsConfig(
        num_experts=fields.integer("num_local_experts", 128),
        experts_per_token=chosen,
        mlp_dim=shapes["mlp_dim"],
        bias=True,
        router_bias=True,
        swiglu_limit=fields.positive("swiglu_limit", 7.0),
        swiglu_alpha=fields.positive("swiglu_alpha", 1.702),
    )
    return _with_sinks(with_mlps(flat, [experts] * layers), True)


def _with_sinks(config: ModelConfig, sinks: bool) -> ModelConfig:
    return config.replace(blocks=tuple(block.with_mixer(sink_logits=sinks) for block in config.blocks))


def _write(config: ModelConfig) -> dict[str, Any]:
    flat, experts, _ = without_experts(_with_sinks(config, False))
    positions, windows = write_positions(flat), write_layer_types(flat)
    return {
        **write_shapes(flat),
        **positions,
        "rope_scaling": positions["rope_scaling"] or {"rope_type": "default"},
        **windows,
        "sliding_window": windows["sliding_window"] or _WINDOW,  # transformers asks for one even where no layer has it
        "attention_bias": flat.qkv_bias,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "swiglu_limit": experts.swiglu_limit,
        "swiglu_alpha": experts.swiglu_alpha,
    }


def _tensors(block: BlockConfig) -> Table:
    return {
        **tensor_tables.without_mlp(block),
        "layers.mixer.sink_logits": (Source(f"{tensor_tables.BLOCK}.self_attn.sinks", "h -> h"),),
        "layers.mlp.router": (Source(f"{_MLP}.router.weight", "x e -> e x"),),
        "layers.mlp.router_bias": (Source(f"{_MLP}.router.bias", "x -> x"),),
        "layers.mlp.up": (Source(f"{_MLP}.experts.gate_up_proj", "x e (f g) -> x e g f"),),
        "layers.mlp.up_bias": (Source(f"{_MLP}.experts.gate_up_proj_bias", "x (f g) -> x g f"),),
        "layers.mlp.down": (Source(f"{_MLP}.experts.down_proj", "x f e -> x f e"),),
        "layers.mlp.down_bias": (Source(f"{_MLP}.experts.down_proj_bias", "x e -> x e"),),
    }


GPT_OSS = Family("gpt_oss", ("GptOssForCausalLM",), ("gpt_oss",), _read, _write, _tensors)
