"""MPT (MosaicML, 2023): ALiBi, LayerNorm without biases, queries, keys and values clipped on request.

What the released models have and transformers computes: multi-head attention with ALiBi and no biases at all. A config
that asks for learned positions, biases, multi-query attention, qk norms, a prefix mask or a logit scale is refused.
`alibi_bias_max`, 16 in MPT-StoryWriter, is honoured; transformers 5.23 computes with 8 whatever the config says.
"""

from __future__ import annotations

import math
from typing import Any

from streamjax.models.config import BlockConfig, RopeConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Table, of_uniform

BLOCK = "transformer.blocks.{layer}"
_BIAS_MAX = 8


def mpt_slopes(num_heads: int, bias_max: float = _BIAS_MAX) -> tuple[float, ...]:
    """ALiBi slopes, one a head; a number of heads that is no power of two takes the next one's, odd ones first."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** -(i * bias_max / power) for i in range(1, power + 1)]
    return tuple(slopes if power == num_heads else (slopes[1::2] + slopes[::2])[:num_heads])


def _read(fields: Fields) -> UniformConfig:
    fields.only("no_bias", (True,), True)
    fields.only("logit_scale", (None,))
    fields.only("norm_type", ("low_precision_layernorm", "layernorm"), "low_precision_layernorm")
    fields.only("expansion_ratio", (4,), 4)
    fields.seen.update(("learned_pos_emb", "embedding_fraction"))  # overruled by ALiBi; scales gradients only
    attention = fields.section("attn_config")
    attention.only("alibi", (True,), True)
    attention.only("attn_type", ("multihead_attention",), "multihead_attention")
    attention.only("qk_ln", (None, False))
    attention.only("prefix_lm", (None, False))
    attention.only("attn_uses_sequence_id", (None, False))
    attention.seen.add("attn_impl")
    d_model, num_heads = fields.integer("d_model"), fields.integer("n_heads")
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"d_model {d_model} is not a multiple of n_heads {num_heads}")
    return UniformConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=d_model,
        num_layers=fields.integer("n_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        mlp_dim=4 * d_model,
        family="mpt",
        norm="layer",
        norm_eps=fields.positive("layer_norm_epsilon", 1e-5),
        gated_mlp=False,
        activation="gelu",
        clip_qkv=_clip(attention),
        attention_scale=attention.optional_positive("softmax_scale"),
        position="alibi",
        rope=RopeConfig(),
        alibi_slopes=mpt_slopes(num_heads, attention.positive("alibi_bias_max", _BIAS_MAX)),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        max_position=fields.integer("max_seq_len", 2048),
    )


def _clip(attention: Fields) -> float | None:
    """`clip_qkv`, of which 0 means none in transformers too."""
    return attention.optional_positive("clip_qkv") if attention.get("clip_qkv", (int, float), None) else None


def _write(config: UniformConfig) -> dict[str, Any]:
    slopes = config.alibi_slopes or mpt_slopes(config.num_heads)
    scale = config.attention_scale
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "expansion_ratio": 4,
        "max_seq_len": config.max_position,
        "layer_norm_epsilon": config.norm_eps,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "tie_word_embeddings": config.tie_embeddings,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": round(-math.log2(min(slopes))),
            "clip_qkv": config.clip_qkv,
            "softmax_scale": None if scale == config.head_dim**-0.5 else scale,
        },
    }


def _tensors(block: BlockConfig) -> Table:
    wqkv = f"{BLOCK}.attn.Wqkv"
    return {
        **tensor_tables.embedding_and_head("transformer.wte", "transformer.norm_f"),
        **tensor_tables.norm("layers.mixer_norm", f"{BLOCK}.norm_1"),
        **tensor_tables.fused("layers.mixer.projections.qkv", wqkv, "(g k d) e -> e k g d", "(g k d) -> k g d"),
        **tensor_tables.out(f"{BLOCK}.attn.out_proj"),
        **tensor_tables.norm("layers.mlp_norm", f"{BLOCK}.norm_2"),
        **tensor_tables.up(f"{BLOCK}.ffn.up_proj"),
        **tensor_tables.down(f"{BLOCK}.ffn.down_proj"),
    }


MPT = Family("mpt", ("MptForCausalLM", "MPTForCausalLM"), ("mpt",), _read, of_uniform(_write), _tensors)
