"""GPT-NeoX and Pythia (2204.06745, 2304.01373): parallel residual, partial rotary, LayerNorm, biases."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields
from streamjax.models.families.family import Family, Table, of_uniform
from streamjax.models.families.llama import check_heads
from streamjax.models.families.rope_fields import read_rope, rotary_fraction, write_scaling

BLOCK = "gpt_neox.layers.{layer}"


def _read(fields: Fields) -> UniformConfig:
    d_model, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    check_heads(d_model, num_heads)
    max_position = fields.integer("max_position_embeddings", 2048)
    bias = fields.flag("attention_bias", True)
    fields.only("is_decoder", (False, True), False)  # decides nothing in a causal model
    fields.only("rope_theta", (None, fields.values.get("rotary_emb_base")))  # a copy, where there is one
    return UniformConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=d_model,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        mlp_dim=fields.integer("intermediate_size"),
        family="gpt_neox",
        norm="layer",
        norm_bias=True,
        norm_eps=fields.positive("layer_norm_eps", 1e-5),
        parallel_residual=fields.flag("use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        gated_mlp=False,
        activation=fields.activation("hidden_act", "gelu"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=max_position,
        rope=read_rope(
            fields,
            head_dim=d_model // num_heads,
            max_position=max_position,
            theta_field="rotary_emb_base",
            partial=0.25,
            partial_field="rotary_pct",
        ),
    )


def _write(config: UniformConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "rotary_emb_base": config.rope.theta,
        "rotary_pct": rotary_fraction(config.rope, config.head_dim),
        "rope_scaling": write_scaling(config.rope),
    }


def _tensors(block: BlockConfig) -> Table:
    qkv = f"{BLOCK}.attention.query_key_value"
    return {
        **tensor_tables.embedding_and_head("gpt_neox.embed_in", "gpt_neox.final_layer_norm", head="embed_out"),
        **tensor_tables.norm("layers.mixer_norm", f"{BLOCK}.input_layernorm"),
        **tensor_tables.norm("layers.mlp_norm", f"{BLOCK}.post_attention_layernorm"),
        **tensor_tables.fused("layers.mixer.projections.qkv", qkv, "(k g d) e -> e k g d", "(k g d) -> k g d"),
        **tensor_tables.out(f"{BLOCK}.attention.dense"),
        **tensor_tables.up(f"{BLOCK}.mlp.dense_h_to_4h"),
        **tensor_tables.down(f"{BLOCK}.mlp.dense_4h_to_h"),
    }


GPT_NEOX = Family(
    "gpt_neox",
    ("GPTNeoXForCausalLM",),
    ("gpt_neox",),
    _read,
    of_uniform(_write),
    _tensors,
    renames=((r"^lm_head\.", "embed_out."),),
    ignored=(r"\.attention\.(bias|masked_bias)$",),
)
