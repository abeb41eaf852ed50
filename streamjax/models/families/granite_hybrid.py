"""Granite 4 (IBM, 2025): Mamba-2 in most layers, attention without positions in the others, experts beside an MLP."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    ExpertsConfig,
    ModelConfig,
    NormConfig,
    SSDConfig,
)
from streamjax.models.families import recurrent_tables, tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields, by_layer
from streamjax.models.families.family import Family, Source, Table
from streamjax.models.families.llama import read_shapes
from streamjax.models.families.mamba2 import read_step_limits, whole, write_step_limits
from streamjax.models.families.rope_fields import read_rope, write_scaling

_TYPES = {"mamba": True, "linear_attention": True, "attention": False, "full_attention": False}
_LAYER = tensor_tables.BLOCK


def read_layer_kinds(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers are recurrent."""
    types = (
        fields.get("layer_types", list, None) or fields.get("layers_block_type", list, None) or ["mamba"] * num_layers
    )
    return by_layer(types, _TYPES, num_layers)


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", ("silu", "swish"), "silu")
    fields.only("normalization_function", ("rmsnorm",), "rmsnorm")
    fields.only("position_embedding_type", (None, "nope", "rope"))
    fields.seen.update(("mamba_chunk_size", "init_method", "rope_theta", "rope_scaling", "rope_parameters"))
    shapes = read_shapes(fields)
    norm, d_model, layers = NormConfig("rms", shapes["norm_eps"]), shapes["d_model"], shapes["num_layers"]
    max_position, bias = fields.integer("max_position_embeddings", 2048), fields.flag("attention_bias", False)
    rope = None
    if fields.get("position_embedding_type", str, None) == "rope":
        rope = read_rope(fields, head_dim=shapes["head_dim"], max_position=max_position)
    attention = AttentionConfig(
        num_heads=shapes["num_heads"],
        num_kv_heads=shapes["num_kv_heads"],
        head_dim=shapes["head_dim"],
        rope=rope,
        scale=fields.positive("attention_multiplier", 1.0),
        qkv_bias=bias,
        out_bias=bias,
    )
    heads, inner = fields.integer("mamba_n_heads", 128), int(fields.positive("mamba_expand", 2.0) * d_model)
    width = fields.get("mamba_d_head", (int, str), "auto")
    width = inner // heads if width == "auto" else width
    if width * heads != inner:
        raise ValueError(f"mamba_n_heads {heads} x mamba_d_head {width} is not mamba_expand x hidden_size, {inner}")
    low, high = read_step_limits(fields, "time_step_limit")
    recurrent = SSDConfig(
        num_heads=heads,
        num_groups=fields.integer("mamba_n_groups", 1),
        head_dim=width,
        state_dim=fields.integer("mamba_d_state", 256),
        conv_width=fields.integer("mamba_d_conv", 4),
        conv_bias=fields.flag("mamba_conv_bias", True),
        bias=fields.flag("mamba_proj_bias", False),
        norm=norm,
        step_min=low,
        step_max=high,
    )
    shared, count = (
        DenseConfig(fields.integer("shared_intermediate_size", 1024)),
        fields.integer("num_local_experts", 8, 0),
    )
    each = fields.integer("num_experts_per_tok", 2, 0)
    mlp = ExpertsConfig(count, each, shapes["mlp_dim"], shared=shared) if count else shared
    scale = fields.positive("residual_multiplier", 1.0)
    blocks = [
        BlockConfig(recurrent if one else attention, mlp, norm, residual_scale=scale)
        for one in read_layer_kinds(fields, layers)
    ]
    return ModelConfig(
        vocab_size=shapes["vocab_size"],
        d_model=d_model,
        blocks=tuple(blocks),
        family="granitemoehybrid",
        norm=norm,
        tie_embeddings=shapes["tie_embeddings"],
        embedding_scale=fields.positive("embedding_multiplier", 1.0),
        logit_scale=1.0 / fields.positive("logits_scaling", 1.0),
        max_position=max_position,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers = [block.mixer for block in config.blocks]
    space = next((mixer for mixer in mixers if isinstance(mixer, SSDConfig)), None)
    attention = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    inner = 2 * config.d_model
    space = SSDConfig(1, 1, inner, 8) if space is None else space
    attention = AttentionConfig(1, 1, config.d_model, rope=None) if attention is None else attention
    mlp = config.blocks[0].mlp
    dense = mlp.shared if isinstance(mlp, ExpertsConfig) else mlp
    if not isinstance(dense, DenseConfig):
        raise ValueError("its layers have no MLP that every token passes through")
    experts = mlp if isinstance(mlp, ExpertsConfig) else None
    rope = attention.rope
    turning = {} if rope is None else {"rope_theta": rope.theta, "rope_scaling": write_scaling(rope)}
    divisor = 1.0 / config.logit_scale
    short = round(divisor, 6)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": ACTIVATION_NAMES[dense.activation],
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "position_embedding_type": "nope" if rope is None else "rope",
        **turning,
        "attention_bias": attention.qkv_bias,
        "attention_multiplier": attention.softmax_scale,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.blocks[0].residual_scale,
        "logits_scaling": short if short and 1.0 / short == config.logit_scale else divisor,
        "layer_types": ["mamba" if mixer.recurrent else "attention" for mixer in mixers],
        "mamba_n_heads": space.num_heads,
        "mamba_d_head": space.head_dim,
        "mamba_expand": whole(space.num_heads * space.head_dim / config.d_model),
        "mamba_n_groups": space.num_groups,
        "mamba_d_state": space.state_dim,
        "mamba_d_conv": space.conv_width,
        "mamba_conv_bias": space.conv_bias,
        "mamba_proj_bias": space.bias,
        "time_step_limit": write_step_limits(space),
        "shared_intermediate_size": dense.mlp_dim,
        "intermediate_size": dense.mlp_dim if experts is None else experts.mlp_dim,
        "num_local_experts": 0 if experts is None else experts.num_experts,
        "num_experts_per_tok": 0 if experts is None else experts.experts_per_token,
    }


def _tensors(block: BlockConfig) -> Table:
    experts = isinstance(block.mlp, ExpertsConfig)
    path, sparse = "layers.mlp.shared" if experts else "layers.mlp", f"{_LAYER}.block_sparse_moe"
    table = {
        **tensor_tables.without_mlp(block),
        f"{path}.up": (Source(f"{_LAYER}.shared_mlp.input_linear.weight", "(g f) e -> e g f"),),
        f"{path}.down": (Source(f"{_LAYER}.shared_mlp.output_linear.weight", "e f -> f e"),),
    }
    if experts:
        table |= {
            "layers.mlp.router": (Source(f"{sparse}.router.layer.weight", "x e -> e x"),),
            "layers.mlp.up": (Source(f"{sparse}.input_linear.weight", "x (g f) e -> x e g f"),),
            "layers.mlp.down": (Source(f"{sparse}.output_linear.weight", "x e f -> x f e"),),
        }
    if isinstance(block.mixer, SSDConfig):
        table |= recurrent_tables.ssd(block.mixer, f"{_LAYER}.mamba")
    return table


GRANITE_HYBRID = Family(
    "granitemoehybrid",
    ("GraniteMoeHybridForCausalLM",),
    ("granitemoehybrid",),
    _read,
    _write,
    _tensors,
    renames=(  # as transformers 5 holds them
        (r"\.block_sparse_moe\.experts\.gate_up_proj$", ".block_sparse_moe.input_linear.weight"),
        (r"\.block_sparse_moe\.experts\.down_proj$", ".block_sparse_moe.output_linear.weight"),
        (r"\.block_sparse_moe\.router\.weight$", ".block_sparse_moe.router.layer.weight"),
    ),
)
