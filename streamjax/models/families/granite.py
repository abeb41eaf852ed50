"""Granite 3 (IBM, 2024): Llama with factors on embeddings, attention logits, residual branches and logits."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, of_uniform
from streamjax.models.families.llama import check_heads, read_positions, read_shapes, write_positions, write_shapes


def _read(fields: Fields) -> UniformConfig:
    shapes = read_shapes(fields)
    check_heads(shapes["d_model"], shapes["num_heads"])
    bias = fields.flag("attention_bias", False)
    return UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 2048),
        family="granite",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        embedding_scale=fields.positive("embedding_multiplier", 1.0),
        attention_scale=fields.positive("attention_multiplier", 1.0),
        residual_scale=fields.positive("residual_multiplier", 1.0),
        logit_scale=1.0 / fields.positive("logits_scaling", 1.0),
    )


def _write(config: UniformConfig) -> dict[str, Any]:
    divisor = 1.0 / config.logit_scale
    short = round(divisor, 6)  # 49.0, and not what 1 / (1 / 49) rounds to
    return {
        **write_shapes(config),
        **write_positions(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "attention_multiplier": config.expand().blocks[0].attention.softmax_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": short if short and 1.0 / short == config.logit_scale else divisor,
    }


GRANITE = Family("granite", ("GraniteForCausalLM",), ("granite",), _read, of_uniform(_write), tensor_tables.llama)
