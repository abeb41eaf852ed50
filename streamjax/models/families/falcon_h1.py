"""Falcon-H1 (2507.22448): in every layer attention and Mamba-2 beside each other, and factors on what they make.

A file has more factors than matter: those on what attention reads are part of the softmax's scale and of the factor on
its output, as far as projections have no biases. What is written has the same products.
"""

from __future__ import annotations

import math
from typing import Any

from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, ModelConfig, NormConfig, SSDConfig
from streamjax.models.families import recurrent_tables, tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Table
from streamjax.models.families.llama import read_shapes
from streamjax.models.families.mamba2 import read_step_limits, write_step_limits
from streamjax.models.families.rope_fields import read_rope, write_scaling

_LAYER = tensor_tables.BLOCK
# Kernels, initial weights, and what other fields say too.
_UNUSED = "mamba_chunk_size mamba_use_mlp num_logits_to_keep layers_block_type layer_types attn_layer_indices"


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", ("silu", "swish"), "silu")
    fields.only("attention_bias", (None, False))
    fields.only("projectors_bias", (None, False))
    fields.only("mamba_proj_bias", (None, False))
    fields.seen.update(_UNUSED.split())
    shapes = read_shapes(fields)
    norm, d_model = NormConfig("rms", shapes["norm_eps"]), shapes["d_model"]
    max_position, width = fields.integer("max_position_embeddings", 8192), shapes["head_dim"]
    into, out = (fields.positive(f"attention_{end}_multiplier", 1.0) for end in ("in", "out"))
    attention = AttentionConfig(
        num_heads=shapes["num_heads"],
        num_kv_heads=shapes["num_kv_heads"],
        head_dim=width,
        rope=read_rope(fields, head_dim=width, max_position=max_position),
        scale=into * into * fields.positive("key_multiplier", 1.0) * width**-0.5,
        out_scale=into * out,
    )
    heads, inner = fields.integer("mamba_n_heads", 128), fields.optional_integer("mamba_d_ssm", 1024)
    expand = fields.positive("mamba_expand", 2.0)
    inner = int(expand * d_model) if inner is None else inner
    size = fields.get("mamba_d_head", (int, str), "auto")
    size = inner // heads if size == "auto" else size
    if size * heads != inner:
        raise ValueError(f"mamba_n_heads {heads} x mamba_d_head {size} is not mamba_d_ssm, {inner}")
    low, high = read_step_limits(fields, "time_step_limit")
    gate, inputs, b, c, steps = (
        fields.positive("ssm_in_multiplier", 1.0) * factor for factor in _factors(fields, "ssm_multipliers", 5)
    )
    groups = fields.integer("mamba_n_groups", 1)
    before_gate = fields.flag("mamba_norm_before_gate", True)
    space = SSDConfig(
        num_heads=heads,
        num_groups=groups,
        head_dim=size,
        state_dim=fields.integer("mamba_d_state", 256),
        conv_width=fields.integer("mamba_d_conv", 4),
        conv_bias=fields.flag("mamba_conv_bias", True),
        norm=norm if fields.flag("mamba_rms_norm", False) else None,
        norm_before_gate=before_gate,
        step_min=low,
        step_max=high,
        scales=(inputs, b, c, gate, steps),
        out_scale=fields.positive("ssm_out_multiplier", 1.0),
    )
    gate, down = _factors(fields, "mlp_multipliers", 2)
    mlp = DenseConfig(shapes["mlp_dim"], bias=fields.flag("mlp_bias", False), gate_scale=gate, out_scale=down)
    return ModelConfig(
        vocab_size=shapes["vocab_size"],
        d_model=d_model,
        blocks=(BlockConfig(attention, mlp, norm, beside=space),) * shapes["num_layers"],
        family="falcon_h1",
        norm=norm,
        tie_embeddings=shapes["tie_embeddings"],
        embedding_scale=fields.positive("embedding_multiplier", 1.0),
        logit_scale=fields.positive("lm_head_multiplier", 1.0),
        max_position=max_position,
    )


def _factors(fields: Fields, name: str, count: int) -> list[float]:
    """A list of positive numbers; ones where it is missing."""
    factors = fields.get(name, list, None) or [1.0] * count
    if len(factors) != count or not all(type(x) in (int, float) and 0 < x < math.inf for x in factors):
        raise ValueError(f"field {name!r} is {factors!r:.80}; expected {count} positive numbers")
    return [float(factor) for factor in factors]


def _write(config: ModelConfig) -> dict[str, Any]:
    block = config.blocks[0]
    attention, space, mlp = block.mixer, block.beside, block.mlp
    if not (isinstance(attention, AttentionConfig) and isinstance(space, SSDConfig) and isinstance(mlp, DenseConfig)):
        raise ValueError("its layers are not attention beside Mamba-2, with an MLP behind them")
    rope = attention.rope
    if rope is None:
        raise ValueError("its attention has no rotation")
    inputs, b, c, gate, steps = space.scales or (1.0,) * 5
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": mlp.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "rope_theta": rope.theta,
        "rope_scaling": write_scaling(rope),
        "attention_bias": False,
        "projectors_bias": False,
        "mlp_bias": mlp.bias,
        "mamba_d_ssm": space.num_heads * space.head_dim,
        "mamba_n_heads": space.num_heads,
        "mamba_d_head": space.head_dim,
        "mamba_n_groups": space.num_groups,
        "mamba_d_state": space.state_dim,
        "mamba_d_conv": space.conv_width,
        "mamba_conv_bias": space.conv_bias,
        "mamba_proj_bias": False,
        "mamba_rms_norm": space.norm is not None,
        "mamba_norm_before_gate": space.norm_before_gate,
        "time_step_limit": write_step_limits(space),
        "embedding_multiplier": config.embedding_scale,
        "lm_head_multiplier": config.logit_scale,
        "mlp_multipliers": [mlp.gate_scale, mlp.out_scale],
        "key_multiplier": _key_factor(attention),
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": attention.out_scale,
        "ssm_in_multiplier": 1.0,
        "ssm_multipliers": [gate, inputs, b, c, steps],
        "ssm_out_multiplier": space.out_scale,
    }


def _key_factor(attention: AttentionConfig) -> float:
    """The factor on keys that reads back as the softmax's scale, however the quotient is rounded."""
    plain = attention.head_dim**-0.5
    factor = attention.softmax_scale / plain
    near = (factor, math.nextafter(factor, 0.0), math.nextafter(factor, math.inf))
    return next((one for one in near if one * plain == attention.softmax_scale), factor)


def _tensors(block: BlockConfig) -> Table:
    table = {
        **tensor_tables.without_mlp(block),
        **tensor_tables.embedding_and_head("model.embed_tokens", "model.final_layernorm"),
        **tensor_tables.norm("layers.mlp_norm", f"{_LAYER}.pre_ff_layernorm"),
        **tensor_tables.gate_up(f"{_LAYER}.feed_forward"),
        **tensor_tables.down(f"{_LAYER}.feed_forward.down_proj"),
    }
    if isinstance(block.beside, SSDConfig):
        table |= recurrent_tables.ssd(block.beside, f"{_LAYER}.mamba", "layers.beside")
    return table


FALCON_H1 = Family("falcon_h1", ("FalconH1ForCausalLM",), ("falcon_h1",), _read, _write, _tensors)
