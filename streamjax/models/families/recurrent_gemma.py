"""RecurrentGemma (2404.07839), Griffin's layers: gated linear recurrent units, and attention with a window."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    ModelConfig,
    NormConfig,
    RGLRUConfig,
)
from streamjax.models.families import recurrent_tables, tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields
from streamjax.models.families.family import Family, Table
from streamjax.models.families.llama import check_heads
from streamjax.models.families.rope_fields import read_rope, rotary_fraction, write_scaling

_LAYER = tensor_tables.BLOCK
_TYPES = {"recurrent": True, "attention": False}
_UNUSED = "final_w_init_variance_scale w_init_variance_scale head_dim _block_types layer_types layers_block_type"


def _embedding_scale(d_model: int) -> float:
    """The root of `d_model`, as bfloat16 has it."""
    return float(jnp.bfloat16(d_model**0.5))


def _read(fields: Fields) -> ModelConfig:
    fields.seen.update(_UNUSED.split())
    fields.only("embeddings_scale_by_sqrt_dim", (None, True))
    d_model, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", 10)
    check_heads(d_model, heads)
    norm, activation = (
        NormConfig("rms", fields.positive("rms_norm_eps", 1e-6), 1.0),
        fields.activation("hidden_activation", "gelu_pytorch_tanh"),
    )
    layers, inner = fields.integer("num_hidden_layers", 26), fields.optional_integer("lru_width") or d_model
    if inner % heads:
        raise ValueError(f"field 'lru_width' is {inner}; it must be a multiple of num_attention_heads, {heads}")
    width, max_position = d_model // heads, fields.integer("max_position_embeddings", 8192)
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields.optional_integer("num_key_value_heads") or heads,
        head_dim=width,
        rope=read_rope(fields, head_dim=width, max_position=max_position, partial=0.5),
        window=fields.integer("attention_window_size", 2048),
        qkv_bias=fields.flag("attention_bias", False),
        out_bias=True,
    )
    recurrent = RGLRUConfig(
        num_heads=heads,
        num_groups=heads,
        channels=inner // heads,
        conv_width=fields.integer("conv1d_width", 4),
        activation=activation,
    )
    intermediate = fields.integer("intermediate_size", 3 * 2560, least=2)
    mlp = DenseConfig(intermediate // 2, activation=activation, bias=True)
    types = fields.get("block_types", (list, tuple), None) or ("recurrent", "recurrent", "attention")
    wrong = next((kind for kind in types if kind not in _TYPES), None)
    if wrong is not None:
        raise ValueError(f"field 'block_types' has {wrong!r:.40}; streamjax has {', '.join(_TYPES)}")
    kinds = [_TYPES[types[layer % len(types)]] for layer in range(layers)]
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 256000),
        d_model=d_model,
        blocks=tuple(BlockConfig(recurrent if one else attention, mlp, norm) for one in kinds),
        family="recurrent_gemma",
        norm=norm,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_scale=_embedding_scale(d_model),
        logit_softcap=fields.positive("logits_soft_cap", 30.0),
        max_position=max_position,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers = [block.mixer for block in config.blocks]
    unit = next((mixer for mixer in mixers if isinstance(mixer, RGLRUConfig)), None)
    attention = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    heads = unit.num_heads if attention is None and unit is not None else 1
    attention = AttentionConfig(heads, heads, config.d_model // heads, window=1) if attention is None else attention
    unit = RGLRUConfig(attention.num_heads, attention.num_heads, attention.head_dim) if unit is None else unit
    mlp = config.blocks[0].mlp
    if not isinstance(mlp, DenseConfig) or attention.rope is None:
        raise ValueError("its layers have no dense MLP, or attention without rotation")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "intermediate_size": 2 * mlp.mlp_dim,
        "hidden_activation": ACTIVATION_NAMES[mlp.activation],
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "attention_window_size": attention.window,
        "attention_bias": attention.qkv_bias,
        "rope_theta": attention.rope.theta,
        "rope_scaling": write_scaling(attention.rope),
        "partial_rotary_factor": rotary_fraction(attention.rope, attention.head_dim),
        "lru_width": unit.num_groups * unit.channels,
        "conv1d_width": unit.conv_width,
        "logits_soft_cap": config.logit_softcap,
        "block_types": ["recurrent" if mixer.recurrent else "attention" for mixer in mixers],
    }


def _tensors(block: BlockConfig) -> Table:
    mixer, mlp = f"{_LAYER}.temporal_block", f"{_LAYER}.mlp_block"
    table = {
        **tensor_tables.embedding_and_head("model.embed_tokens", "model.final_norm"),
        **tensor_tables.norm("layers.mixer_norm", f"{_LAYER}.temporal_pre_norm"),
        **tensor_tables.norm("layers.mlp_norm", f"{_LAYER}.channel_pre_norm"),
        **tensor_tables.gate_up(mlp),
        **tensor_tables.down(f"{mlp}.down_proj"),
    }
    if isinstance(block.mixer, RGLRUConfig):
        return {**table, **recurrent_tables.rg_lru(block.mixer, mixer)}
    return {**table, **tensor_tables.qkv(block, mixer), **tensor_tables.out(f"{mixer}.o_proj")}


RECURRENT_GEMMA = Family(
    "recurrent_gemma", ("RecurrentGemmaForCausalLM",), ("recurrent_gemma",), _read, _write, _tensors
)
