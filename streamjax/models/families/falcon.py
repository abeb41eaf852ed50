"""Falcon (2311.16867): three layouts of one architecture.

Falcon 7B has one key/value head, and one norm that feeds attention and MLP in parallel. Falcon 40B and 180B ("new
decoder architecture") have several and two norms. falcon-rw has ALiBi, biases and the two branches in sequence.

ALiBi here adds the bias before scaling by 1 / sqrt(head width), so the slopes are scaled too. transformers rounds the
slopes to bfloat16, and so does this family. It also rounds slope times key index to bfloat16, which depends on where a
key stands and not on its distance; the library does not. The two agree exactly while the products need no more than
eight bits (256 tokens, a power of two of at most 8 heads), and differ by that rounding beyond. (The eager attention
of transformers 5.23 adds the bias twice; its default, sdpa, is the one to compare with.)
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from streamjax.models.config import BlockConfig, RopeConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields
from streamjax.models.families.family import Family, Table, of_uniform
from streamjax.models.families.llama import check_heads
from streamjax.models.families.rope_fields import read_rope, write_scaling

BLOCK = "transformer.h.{layer}"


def falcon_slopes(num_heads: int, head_dim: int) -> tuple[float, ...]:
    """ALiBi slopes as they are added to the scaled logits, one a head."""
    power = 2 ** math.floor(math.log2(num_heads))
    exponents = [8.0 * i / power for i in range(1, power + 1)]
    exponents += [4.0 * i / power for i in range(1, 2 * (num_heads - power), 2)]
    rounded = np.exp2(-np.array(exponents)).astype(np.float32).astype(ml_dtypes.bfloat16)
    return tuple(float(slope) / math.sqrt(head_dim) for slope in rounded)


def _read(fields: Fields) -> UniformConfig:
    d_model, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    check_heads(d_model, num_heads)
    head_dim = d_model // num_heads
    kv_heads, parallel, shared = _read_layout(fields, num_heads)
    alibi, bias = fields.flag("alibi", False), fields.flag("bias", False)
    max_position = fields.integer("max_position_embeddings", 2048)
    rope = read_rope(fields, head_dim=head_dim, max_position=max_position)
    return UniformConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=d_model,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=fields.integer("ffn_hidden_size", 4 * d_model),
        family="falcon",
        norm="layer",
        norm_bias=True,
        norm_eps=fields.positive("layer_norm_epsilon", 1e-5),
        parallel_residual=parallel,
        shared_norm=shared,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        gated_mlp=False,
        activation=fields.activation("activation", "gelu"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        position="alibi" if alibi else "rope",
        rope=RopeConfig() if alibi else rope,
        alibi_slopes=falcon_slopes(num_heads, head_dim) if alibi else (),
        max_position=max_position,
    )


def _read_layout(fields: Fields, num_heads: int) -> tuple[int, bool, bool]:
    """Key/value heads, whether the branches are parallel, and whether one norm feeds both."""
    new = fields.flag("new_decoder_architecture", False)
    parallel, multi_query = fields.flag("parallel_attn", True), fields.flag("multi_query", True)
    norms = fields.get("num_ln_in_parallel_attn", int, None)
    kv_heads = fields.integer("num_kv_heads", num_heads)
    if new:
        if not parallel:
            raise ValueError("field 'parallel_attn' is false with new_decoder_architecture, which has no such layout")
        fields.only("num_ln_in_parallel_attn", (None, 1, 2))
        return kv_heads, True, norms == 1
    if parallel and norms == 2:
        raise ValueError("field 'num_ln_in_parallel_attn' is 2, which only new_decoder_architecture has")
    if not multi_query and kv_heads != num_heads:
        raise ValueError(f"field 'num_kv_heads' is {kv_heads} without multi_query; it must be {num_heads}")
    return 1 if multi_query else num_heads, parallel, parallel


def _write(config: UniformConfig) -> dict[str, Any]:
    simple = config.num_kv_heads in (1, config.num_heads) and config.shared_norm == config.parallel_residual
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads if not simple else config.num_heads,
        "ffn_hidden_size": config.mlp_dim,
        "layer_norm_epsilon": config.norm_eps,
        "activation": ACTIVATION_NAMES[config.activation],
        "alibi": config.position == "alibi",
        "bias": config.qkv_bias,
        "multi_query": config.num_kv_heads == 1,
        "parallel_attn": config.parallel_residual,
        "new_decoder_architecture": not simple,
        "num_ln_in_parallel_attn": None if simple else 1 if config.shared_norm else 2,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope.theta,
        "rope_scaling": write_scaling(config.rope) if config.position == "rope" else None,
    }


def _tensors(block: BlockConfig) -> Table:
    two_norms = block.residual == "parallel" and not block.shared_norm
    mixer_norm, mlp_norm = ("ln_attn", "ln_mlp") if two_norms else ("input_layernorm", "post_attention_layernorm")
    qkv = f"{BLOCK}.self_attention.query_key_value"
    return {
        **tensor_tables.embedding_and_head("transformer.word_embeddings", "transformer.ln_f"),
        **tensor_tables.norm("layers.mixer_norm", f"{BLOCK}.{mixer_norm}"),
        **tensor_tables.norm("layers.mlp_norm", f"{BLOCK}.{mlp_norm}"),
        **tensor_tables.fused("layers.mixer.projections.qkv", qkv, "(k g d) e -> e k g d", "(k g d) -> k g d"),
        **tensor_tables.out(f"{BLOCK}.self_attention.dense"),
        **tensor_tables.up(f"{BLOCK}.mlp.dense_h_to_4h"),
        **tensor_tables.down(f"{BLOCK}.mlp.dense_4h_to_h"),
    }


FALCON = Family(
    "falcon",
    ("FalconForCausalLM",),
    ("falcon",),
    _read,
    of_uniform(_write),
    _tensors,
    ignored=(r"\.(maybe_rotary|rotary)\.inv_freq$",),
)
