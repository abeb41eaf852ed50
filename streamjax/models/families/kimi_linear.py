"""Kimi-Linear (2510.26692): Kimi Delta Attention in most layers, latent attention without positions, experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from streamjax.models.config import (
    BlockConfig,
    DenseConfig,
    ExpertsConfig,
    KimiDeltaConfig,
    LatentAttentionConfig,
    ModelConfig,
    NormConfig,
)
from streamjax.models.families import recurrent_tables, tensor_tables
from streamjax.models.families.config_fields import Fields, by_layer
from streamjax.models.families.deepseek import LATENT_EPS, latent_tensors
from streamjax.models.families.experts_fields import read_experts, the_experts
from streamjax.models.families.family import Family, Source, Table
from streamjax.models.families.qwen3_next import LAYER_TYPES

_LAYER = tensor_tables.BLOCK
_ATTENTION, _DENSE, _SPARSE = f"{_LAYER}.self_attn", f"{_LAYER}.mlp", f"{_LAYER}.block_sparse_moe"
_UNUSED = """
    head_dim qk_head_dim num_key_value_heads rope_theta rope_scaling rope_parameters v_head_dim use_grouped_topk
    num_nextn_predict_layers
"""
_OLDER = {  # names in published files of what transformers calls otherwise
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}


def _recurrent_layers(fields: Fields, linear: Fields, layers: int) -> list[bool]:
    types = fields.get("layer_types", list, None)
    attending, recurrent = (linear.get(name, list, None) for name in ("full_attn_layers", "kda_layers"))
    if types is None and attending is not None and recurrent is not None:
        places = [*attending, *recurrent]
        if not all(type(place) is int for place in places) or sorted(places) != list(range(1, layers + 1)):
            raise ValueError(
                f"fields 'full_attn_layers' and 'kda_layers' of 'linear_attn_config' must name each of {layers} layers"
            )
        return [layer + 1 in recurrent for layer in range(layers)]
    if types is None:
        types = ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(layers)]
    return by_layer(types, LAYER_TYPES, layers)


def _sparse_layers(fields: Fields, layers: int) -> list[bool]:
    first = fields.integer("first_k_dense_replace", 1, least=0)
    types = fields.get("mlp_layer_types", list, None)
    if types is None:
        return [layer >= first for layer in range(layers)]
    if len(types) != layers or not all(kind in ("dense", "sparse") for kind in types):
        raise ValueError(f"field 'mlp_layer_types' is {types!r:.80}; expected 'dense' or 'sparse' for {layers} layers")
    return [kind == "sparse" for kind in types]


def _read_experts(fields: Fields) -> ExpertsConfig:
    fields.only("moe_router_activation_func", (None, "sigmoid"))
    fields.defaults = {"moe_intermediate_size": 1024}
    experts = read_experts(
        fields,
        count=256,
        each=8,
        width="moe_intermediate_size",
        normalize=fields.flag("norm_topk_prob", True),
        activation="silu",
    )
    return dataclasses.replace(
        experts,
        shared=DenseConfig(experts.mlp_dim * fields.integer("n_shared_experts", 1)),
        scores="sigmoid",
        group_rank="two best",
        selection_bias=True,
        weight_scale=fields.positive("routed_scaling_factor", 2.446),
        groups=fields.optional_integer("n_group", 1) or 1,
        groups_per_token=fields.optional_integer("topk_group", 1) or 1,
    )


def _read(fields: Fields) -> ModelConfig:
    for name, older in _OLDER.items():
        if older in fields.values:
            fields.values[name] = fields.values.pop(older)
    fields.seen.update(_UNUSED.split())
    fields.only("hidden_act", ("silu", "swish"), "silu")
    fields.only("attention_bias", (None, False))
    fields.only("moe_layer_freq", (None, 1))
    fields.only("mla_use_nope", (None, True))
    linear, layers = fields.section("linear_attn_config"), fields.integer("num_hidden_layers", 27)
    norm, d_model = NormConfig("rms", fields.positive("rms_norm_eps", 1e-5)), fields.integer("hidden_size", 2304)
    width = linear.integer("head_dim", fields.integer("linear_head_dim", 128))
    heads = linear.integer("num_heads", fields.integer("linear_num_heads", 32))
    kernel = linear.integer("short_conv_kernel_size", fields.integer("linear_conv_kernel_dim", 4))
    delta = KimiDeltaConfig(heads, heads, key_dim=width, value_dim=width, rank=width, conv_width=kernel, norm=norm)
    attention = LatentAttentionConfig(
        num_heads=fields.integer("num_attention_heads", 32),
        kv_rank=fields.integer("kv_lora_rank", 512),
        nope_dim=fields.integer("qk_nope_head_dim", 128),
        rope_dim=fields.integer("qk_rope_head_dim", 64),
        value_dim=fields.integer("v_head_dim", 128),
        q_rank=fields.optional_integer("q_lora_rank"),
        rope=None,
        interleaved=False,
        norm=NormConfig(eps=LATENT_EPS),
    )
    experts, dense = _read_experts(fields), DenseConfig(fields.integer("intermediate_size", 9216))
    kinds = zip(_recurrent_layers(fields, linear, layers), _sparse_layers(fields, layers), strict=True)
    blocks = [BlockConfig(delta if one else attention, experts if sparse else dense, norm) for one, sparse in kinds]
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 163840),
        d_model=d_model,
        blocks=tuple(blocks),
        family="kimi_linear",
        norm=norm,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=fields.integer("max_position_embeddings", 1048576),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers, experts = [block.mixer for block in config.blocks], the_experts(config)
    delta = next((mixer for mixer in mixers if isinstance(mixer, KimiDeltaConfig)), None)
    attention = next((mixer for mixer in mixers if isinstance(mixer, LatentAttentionConfig)), None)
    delta = KimiDeltaConfig(1, 1, 8, 8, 8) if delta is None else delta
    attention = LatentAttentionConfig(1, 8, 8, 8, 8, rope=None) if attention is None else attention
    if attention.rope is not None:
        raise ValueError("its latent attention rotates")
    dense = [block.mlp.mlp_dim for block in config.blocks if isinstance(block.mlp, DenseConfig)]
    shared = 0 if experts.shared is None else experts.shared.mlp_dim
    recurrent = [mixer.recurrent for mixer in mixers]
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "kv_lora_rank": attention.kv_rank,
        "q_lora_rank": attention.q_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.value_dim,
        "mla_use_nope": True,
        "linear_attn_config": {
            "head_dim": delta.key_dim,
            "num_heads": delta.num_heads,
            "short_conv_kernel_size": delta.conv_width,
            "full_attn_layers": [layer + 1 for layer, one in enumerate(recurrent) if not one],
            "kda_layers": [layer + 1 for layer, one in enumerate(recurrent) if one],
        },
        "intermediate_size": dense[0] if dense else experts.mlp_dim,
        "moe_intermediate_size": experts.mlp_dim,
        "first_k_dense_replace": len(dense),
        "mlp_layer_types": ["sparse" if isinstance(b.mlp, ExpertsConfig) else "dense" for b in config.blocks],
        "num_experts": experts.num_experts,
        "num_experts_per_token": experts.experts_per_token,
        "num_shared_experts": shared // experts.mlp_dim,
        "num_expert_group": experts.groups,
        "topk_group": experts.groups_per_token,
        "moe_renormalize": experts.normalize_weights,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": experts.weight_scale,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "model_max_length": config.max_position,
    }


def _tensors(block: BlockConfig) -> Table:
    table = {
        **tensor_tables.embedding_and_head("model.embed_tokens", "model.norm"),
        **tensor_tables.norm("layers.mixer_norm", f"{_LAYER}.input_layernorm"),
        **tensor_tables.norm("layers.mlp_norm", f"{_LAYER}.post_attention_layernorm"),
    }
    if isinstance(block.mixer, KimiDeltaConfig):
        table |= recurrent_tables.kimi_delta(block.mixer, _ATTENTION)
    elif isinstance(block.mixer, LatentAttentionConfig):
        table |= latent_tensors(block.mixer)
    if not isinstance(block.mlp, ExpertsConfig):
        return {**table, **tensor_tables.gate_up(_DENSE), **tensor_tables.down(f"{_DENSE}.down_proj")}
    return {
        **table,
        **tensor_tables.experts(f"{_SPARSE}.gate", f"{_SPARSE}.experts", ("w1", "w3", "w2")),
        **tensor_tables.gate_up(f"{_SPARSE}.shared_experts", "layers.mlp.shared"),
        **tensor_tables.down(f"{_SPARSE}.shared_experts.down_proj", "layers.mlp.shared"),
        "layers.mlp.selection_bias": (Source(f"{_SPARSE}.gate.e_score_correction_bias", "x -> x"),),
    }


KIMI_LINEAR = Family(
    "kimi_linear",
    ("KimiLinearForCausalLM",),
    ("kimi_linear",),
    _read,
    _write,
    _tensors,
    renames=(  # as transformers 5 holds and writes them
        (r"\.self_attn\.forget_gate\.", ".self_attn."),
        (r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),
        (r"\.mlp\.(experts|gate|shared_experts)\.", r".block_sparse_moe.\1."),
    ),
    packed=tensor_tables.packed_experts(f"{_SPARSE}.experts"),
)
