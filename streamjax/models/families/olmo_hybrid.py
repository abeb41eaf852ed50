"""OLMo-hybrid (2026): Gated DeltaNet in three of four layers, OLMo 2's attention in the others, rotated or not.

Recurrent layers have norms before their branches, those that attend behind them.
"""

from __future__ import annotations

from typing import Any

from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    GatedDeltaConfig,
    ModelConfig,
    NormConfig,
)
from streamjax.models.families import recurrent_tables, tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields, by_layer
from streamjax.models.families.family import Family, Table
from streamjax.models.families.llama import check_heads, read_shapes
from streamjax.models.families.qwen3_next import LAYER_TYPES
from streamjax.models.families.rope_fields import read_rope, write_scaling

_LAYER = tensor_tables.BLOCK
_STATE_NORM = NormConfig(eps=1e-5)  # of what heads read, whatever `rms_norm_eps` says
_INITIAL = ("linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min")


def _read(fields: Fields) -> ModelConfig:
    fields.seen.update(_INITIAL)
    fields.only("hidden_act", ("silu", "swish"), "silu")
    shapes = read_shapes(fields)
    d_model, heads, layers = shapes["d_model"], shapes["num_heads"], shapes["num_layers"]
    check_heads(d_model, heads)
    norm, bias = NormConfig("rms", shapes["norm_eps"]), fields.flag("attention_bias", False)
    max_position, turning = fields.integer("max_position_embeddings", 65536), fields.values.get("rope_parameters")
    rope = None
    if isinstance(turning, dict) and "rope_theta" in turning and turning["rope_theta"] is None:
        fields.seen.update(("rope_parameters", "rope_theta", "rope_scaling"))
    else:
        rope = read_rope(fields, head_dim=shapes["head_dim"], max_position=max_position)
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=shapes["num_kv_heads"],
        head_dim=shapes["head_dim"],
        rope=rope,
        qk_norm=norm,
        qk_norm_over="projection",
        qkv_bias=bias,
        out_bias=bias,
    )
    groups = fields.optional_integer("linear_num_key_heads") or heads
    key_dim = fields.optional_integer("linear_key_head_dim") or max(1, int(0.75 * d_model / groups))
    delta = GatedDeltaConfig(
        num_heads=fields.optional_integer("linear_num_value_heads") or heads,
        num_groups=groups,
        key_dim=key_dim,
        value_dim=fields.optional_integer("linear_value_head_dim") or 2 * key_dim,
        conv_width=fields.integer("linear_conv_kernel_dim", 4),
        norm=_STATE_NORM,
        negative_eigenvalues=fields.flag("linear_allow_neg_eigval", True),
    )
    mlp = DenseConfig(shapes["mlp_dim"], activation=shapes["activation"])
    types = fields.get("layer_types", list, None)
    if types is None:
        types = [
            "full_attention" if i % 4 == 3 or (layers < 4 and i == layers - 1) else "linear_attention"
            for i in range(layers)
        ]
    blocks = {
        True: BlockConfig(delta, mlp, norm),
        False: BlockConfig(attention, mlp, norm, pre_norms=False, post_norms=True),
    }
    return ModelConfig(
        vocab_size=shapes["vocab_size"],
        d_model=d_model,
        blocks=tuple(blocks[one] for one in by_layer(types, LAYER_TYPES, layers)),
        family="olmo_hybrid",
        norm=norm,
        tie_embeddings=shapes["tie_embeddings"],
        max_position=max_position,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers = [block.mixer for block in config.blocks]
    delta = next((mixer for mixer in mixers if isinstance(mixer, GatedDeltaConfig)), None)
    attention = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    mlp = config.blocks[0].mlp
    if delta is None or attention is None or not isinstance(mlp, DenseConfig):
        raise ValueError("it needs layers of Gated DeltaNet and such that attend, with a dense MLP")
    rope = attention.rope
    turning: dict[str, Any] = {"rope_type": "default", "rope_theta": None}
    if rope is not None:
        turning = {"rope_type": "default", **(write_scaling(rope) or {}), "rope_theta": rope.theta}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "intermediate_size": mlp.mlp_dim,
        "hidden_act": ACTIVATION_NAMES[mlp.activation],
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "attention_bias": attention.qkv_bias,
        "rope_parameters": turning,
        "layer_types": ["linear_attention" if mixer.recurrent else "full_attention" for mixer in mixers],
        "linear_num_value_heads": delta.num_heads,
        "linear_num_key_heads": delta.num_groups,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.conv_width,
        "linear_allow_neg_eigval": delta.negative_eigenvalues,
    }


def _tensors(block: BlockConfig) -> Table:
    table = {**tensor_tables.llama(block), **tensor_tables.qk_norms(f"{_LAYER}.self_attn")}
    if isinstance(block.mixer, GatedDeltaConfig):
        return {**table, **recurrent_tables.gated_delta(block.mixer, f"{_LAYER}.linear_attn", "single")}
    return {
        **table,
        **tensor_tables.norm("layers.mixer_post_norm", f"{_LAYER}.post_attention_layernorm"),
        **tensor_tables.norm("layers.mlp_post_norm", f"{_LAYER}.post_feedforward_layernorm"),
    }


OLMO_HYBRID = Family(
    "olmo_hybrid",
    ("OlmoHybridForCausalLM",),
    ("olmo_hybrid",),
    _read,
    _write,
    _tensors,
    renames=(
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
)
