"""Llama 1, 2 and 3 (2302.13971, 2307.09288, 2407.21783): the layout that most families share, and its fields."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields
from streamjax.models.families.family import Family, of_uniform
from streamjax.models.families.rope_fields import read_rope, write_scaling


def read_shapes(
    fields: Fields,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    tie: bool = False,
    activation: str = "hidden_act",
    norm_eps: float = 1e-6,
) -> dict[str, Any]:
    """Sizes, norm and activation, by the names that Llama gave them.

    Args:
      fields: the config.
      head_dim: width of a head where the config is silent; None: d_model / heads.
      kv_heads: key/value heads where the config is silent; None: as many as query heads.
      tie: whether embeddings are tied where the config is silent.
      activation: the field that names the activation function.
      norm_eps: of the norms where the config is silent.
    """
    d_model, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.get("head_dim", int, head_dim)
    if head_dim is None:
        check_heads(d_model, num_heads)
        head_dim = d_model // num_heads
    kv_heads = fields.get("num_key_value_heads", int, kv_heads)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": d_model,
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "mlp_dim": fields.integer("intermediate_size"),
        "norm_eps": fields.positive("rms_norm_eps", norm_eps),
        "activation": fields.activation(activation, "silu" if activation == "hidden_act" else "gelu_pytorch_tanh"),
        "tie_embeddings": fields.flag("tie_word_embeddings", tie),
    }


def check_heads(d_model: int, num_heads: int) -> None:
    """Refuse sizes that an architecture without a head width of its own, or transformers, does not take."""
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"hidden_size {d_model} is not a multiple of num_attention_heads {num_heads}")


def write_shapes(config: UniformConfig) -> dict[str, Any]:
    """The inverse of `read_shapes`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
    }


def read_positions(fields: Fields, head_dim: int, max_position: int, theta: float = 10_000.0) -> dict[str, Any]:
    """`max_position` and the RoPE of a model that rotates whole heads; the last two arguments are defaults."""
    max_position = fields.integer("max_position_embeddings", max_position)
    rope = read_rope(fields, head_dim=head_dim, max_position=max_position, theta=theta)
    return {"max_position": max_position, "rope": rope}


def write_positions(config: UniformConfig) -> dict[str, Any]:
    """The inverse of `read_positions`."""
    return {"rope_theta": config.rope.theta, "rope_scaling": write_scaling(config.rope)}


def _read(fields: Fields) -> UniformConfig:
    shapes = read_shapes(fields)
    check_heads(shapes["d_model"], shapes["num_heads"])
    bias = fields.flag("attention_bias", False)
    return UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 2048),
        family="llama",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _write(config: UniformConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return {**write_shapes(config), **write_positions(config), **biases}


LLAMA = Family(
    "llama", ("LlamaForCausalLM", "LLaMAForCausalLM"), ("llama",), _read, of_uniform(_write), tensor_tables.llama
)
