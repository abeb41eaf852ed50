"""Gemma 2 (2408.00118) and the text part of Gemma 3 (2503.19786): local and global layers in turn, four norms a layer.

Both norm what a branch returns as well as what it reads, store norm weights minus one and scale embeddings by
sqrt(d_model). Gemma 2 caps its logits; Gemma 3 norms queries and keys instead and gives local layers a RoPE base of
their own. A multimodal Gemma 3 checkpoint loads as its language model: the tensors of vision tower and projector are
left alone. transformers' Gemma 3 takes `attn_logit_softcapping` but does not apply it, so a value there is refused.
"""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Table, of_uniform
from streamjax.models.families.llama import check_heads, read_positions, read_shapes, write_positions, write_shapes
from streamjax.models.families.rope_fields import read_layer_ropes, write_scaling
from streamjax.models.families.window_fields import read_layer_types, write_layer_types

_LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 1_000_000.0
_VISION_FIELDS = (
    "vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index boi_token_id eoi_token_id "
    "image_token_id"
)


def _read_common(fields: Fields, shapes: dict[str, Any], period: int) -> dict[str, Any]:
    """What the two generations share; every `period`-th layer is global."""
    fields.only("use_bidirectional_attention", (None, False))
    fields.seen.add("hidden_act")  # an older name, overruled by hidden_activation
    check_heads(shapes["d_model"], shapes["num_heads"])
    num_layers, bias = shapes["num_layers"], fields.flag("attention_bias", False)
    window = fields.get("sliding_window", int, 4096)
    return {
        **shapes,
        "norm_offset": 1.0,
        "post_norms": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "embedding_scale": shapes["d_model"] ** 0.5,
        "attention_scale": fields.positive("query_pre_attn_scalar", 256) ** -0.5,
        "windows": read_layer_types(fields, num_layers, window, [(i + 1) % period != 0 for i in range(num_layers)]),
    }


def _write_common(config: UniformConfig) -> dict[str, Any]:
    shapes = write_shapes(config)
    shapes["hidden_activation"] = shapes.pop("hidden_act")
    return {
        **shapes,
        **write_layer_types(config, unused=4096),
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(config.expand().blocks[0].attention.softmax_scale ** -2),
        "final_logit_softcapping": config.logit_softcap,
    }


def _read2(fields: Fields) -> UniformConfig:
    shapes = read_shapes(fields, head_dim=256, kv_heads=4, tie=True, activation="hidden_activation")
    return UniformConfig(
        **_read_common(fields, shapes, period=2),
        **read_positions(fields, shapes["head_dim"], 8192),
        family="gemma2",
        attention_softcap=fields.optional_positive("attn_logit_softcapping", 50.0),
        logit_softcap=fields.optional_positive("final_logit_softcapping", 30.0),
    )


def _write2(config: UniformConfig) -> dict[str, Any]:
    capped = {"attn_logit_softcapping": config.attention_softcap}
    return {**_write_common(config), **write_positions(config), **capped}


def _read3(fields: Fields) -> UniformConfig:
    text = fields
    if "text_config" in fields.values:
        text = fields.section("text_config")
        fields.seen.update(_VISION_FIELDS.split())
    sizes = {"vocab_size": 262_208, "hidden_size": 2304, "num_attention_heads": 8, "num_hidden_layers": 26}
    text.defaults = {**sizes, "intermediate_size": 9216}
    shapes = read_shapes(text, head_dim=256, kv_heads=4, tie=True, activation="hidden_activation")
    shapes["tie_embeddings"] = fields.flag("tie_word_embeddings", shapes["tie_embeddings"])
    text.only("attn_logit_softcapping", (None,))
    text.seen.add("_sliding_window_pattern")  # the same again; transformers 5 writes layer_types beside it
    max_position = text.integer("max_position_embeddings", 131_072)
    rope, local_rope = read_layer_ropes(
        text,
        head_dim=shapes["head_dim"],
        max_position=max_position,
        theta=text.positive("rope_theta", _GLOBAL_THETA),
        local_theta=text.positive("rope_local_base_freq", _LOCAL_THETA),
    )
    return UniformConfig(
        **_read_common(text, shapes, period=text.integer("sliding_window_pattern", 6)),
        family="gemma3",
        qk_norm=True,
        max_position=max_position,
        rope=rope,
        local_rope=local_rope,
        logit_softcap=text.optional_positive("final_logit_softcapping"),
    )


def _write3(config: UniformConfig) -> dict[str, Any]:
    local = config.local_rope or config.rope
    values = {"rope_theta": config.rope.theta, "rope_scaling": write_scaling(config.rope)}
    if local.kind != "default":
        raise ValueError("a scaled local_rope has no field in config.json")
    return {**_write_common(config), **values, "rope_local_base_freq": local.theta}


def _tensors2(block: BlockConfig) -> Table:
    return {
        **tensor_tables.llama(block),
        **tensor_tables.norm("layers.mixer_post_norm", f"{tensor_tables.BLOCK}.post_attention_layernorm"),
        **tensor_tables.norm("layers.mlp_norm", f"{tensor_tables.BLOCK}.pre_feedforward_layernorm"),
        **tensor_tables.norm("layers.mlp_post_norm", f"{tensor_tables.BLOCK}.post_feedforward_layernorm"),
    }


def _tensors3(block: BlockConfig) -> Table:
    return {**_tensors2(block), **tensor_tables.qk_norms(f"{tensor_tables.BLOCK}.self_attn")}


GEMMA2 = Family("gemma2", ("Gemma2ForCausalLM",), ("gemma2",), _read2, of_uniform(_write2), _tensors2)
GEMMA3 = Family(
    "gemma3",
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    ("gemma3_text", "gemma3"),
    _read3,
    of_uniform(_write3),
    _tensors3,
    renames=tensor_tables.MULTIMODAL_RENAMES,
    ignored=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
)
