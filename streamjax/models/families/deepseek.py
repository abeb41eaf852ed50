"""DeepSeek-V2 and V3 (2405.04434, 2412.19437): latent attention, and experts behind some dense layers.

The layer that predicts a further token (V3's multi-token prediction) is left alone, as transformers does.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from streamjax.models.config import (
    BlockConfig,
    DenseConfig,
    ExpertsConfig,
    LatentAttentionConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
)
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields
from streamjax.models.families.experts_fields import read_experts, the_experts
from streamjax.models.families.family import Family, Source, Table
from streamjax.models.families.rope_fields import read_rope, write_scaling

_ATTENTION, _MLP = f"{tensor_tables.BLOCK}.self_attn", f"{tensor_tables.BLOCK}.mlp"
LATENT_EPS = 1e-6  # of the latents' norms, whatever `rms_norm_eps` says


def _read(fields: Fields, family: str, max_position: int, dense_layers: int, experts: ExpertsConfig) -> ModelConfig:
    """A model whose first layers are dense and whose others have `experts`."""
    fields.only("attention_bias", (None, False))
    fields.only("mlp_bias", (None, False))
    fields.only("moe_layer_freq", (None, 1))
    for name in ("head_dim", "qk_head_dim", "num_key_value_heads"):  # follow from the other sizes
        fields.optional_integer(name)
    max_position = fields.integer("max_position_embeddings", max_position)
    layers, dense = fields.integer("num_hidden_layers"), fields.integer("first_k_dense_replace", dense_layers, least=0)
    mixer = _read_mixer(fields, max_position)
    norm = NormConfig(eps=fields.positive("rms_norm_eps", 1e-6))
    mlp = DenseConfig(fields.integer("intermediate_size"), activation=experts.activation)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=fields.integer("hidden_size"),
        blocks=tuple(BlockConfig(mixer, mlp if i < dense else experts, norm) for i in range(layers)),
        family=family,
        norm=norm,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=max_position,
    )


def _read_mixer(fields: Fields, max_position: int) -> LatentAttentionConfig:
    rope_dim, nope_dim = fields.integer("qk_rope_head_dim", 64), fields.integer("qk_nope_head_dim", 128)
    rope = read_rope(fields, head_dim=rope_dim, max_position=max_position)
    q_rank = fields.optional_integer("q_lora_rank", 1536)
    return LatentAttentionConfig(
        num_heads=fields.integer("num_attention_heads"),
        kv_rank=fields.integer("kv_lora_rank", 512),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=fields.integer("v_head_dim", 128),
        q_rank=q_rank,
        rope=dataclasses.replace(rope, rotary_dim=rope_dim),
        interleaved=fields.flag("rope_interleave", True),
        norm=NormConfig(eps=LATENT_EPS),
        scale=(nope_dim + rope_dim) ** -0.5 * _longer(rope),
    )


def _longer(rope: RopeConfig) -> float:
    """What YaRN multiplies the products of queries and keys by, where `mscale_all_dim` says so."""
    if rope.kind == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def _read_experts(
    fields: Fields, count: int, each: int, width: int, shared: int, normalize: bool, **routing: Any
) -> ExpertsConfig:
    activation = fields.activation("hidden_act", "silu")
    fields.seen.update(("num_experts", "num_local_experts"))
    fields.defaults = {"moe_intermediate_size": width}
    experts = read_experts(
        fields,
        count=count,
        each=each,
        width="moe_intermediate_size",
        normalize=normalize,
        activation=activation,
        counts=("n_routed_experts",),
    )
    together = experts.mlp_dim * fields.integer("n_shared_experts", shared)
    scale = fields.positive("routed_scaling_factor", 1.0)
    one = DenseConfig(together, activation=activation)
    return dataclasses.replace(experts, shared=one, weight_scale=scale, **routing)


def _groups(fields: Fields, count: int | None, each: int | None) -> dict[str, int]:
    return {
        "groups": fields.optional_integer("n_group", count) or 1,
        "groups_per_token": fields.optional_integer("topk_group", each) or 1,
    }


def _read2(fields: Fields) -> ModelConfig:
    fields.only("norm_topk_prob", (None, False))
    fields.only("scoring_func", (None, "softmax"))
    fields.only("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    groups = _groups(fields, None, None)
    if fields.values.get("topk_method", "greedy") == "greedy":
        groups = {}
    experts = _read_experts(fields, 64, 6, 1407, 2, False, **groups)
    return _read(fields, "deepseek_v2", 2048, 0, experts)


def _read3(fields: Fields) -> ModelConfig:
    fields.only("scoring_func", (None, "sigmoid"))
    fields.only("topk_method", (None, "noaux_tc"))
    routing = {"scores": "sigmoid", "group_rank": "two best", "selection_bias": True}
    normalize = fields.flag("norm_topk_prob", True)
    experts = _read_experts(fields, 256, 8, 2048, 1, normalize, **routing, **_groups(fields, 8, 4))
    return _read(fields, "deepseek_v3", 4096, 3, experts)


def _write(config: ModelConfig) -> tuple[dict[str, Any], LatentAttentionConfig, ExpertsConfig]:
    mixer, experts = config.blocks[0].mixer, the_experts(config)
    if not isinstance(mixer, LatentAttentionConfig):
        raise ValueError("its layers have no latent attention")
    if mixer.rope is None:
        raise ValueError("its latent attention does not rotate")
    dense = [block.mlp.mlp_dim for block in config.blocks if isinstance(block.mlp, DenseConfig)]
    shared = 0 if experts.shared is None else experts.shared.mlp_dim
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.q_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "intermediate_size": dense[0] if dense else experts.mlp_dim,
        "moe_intermediate_size": experts.mlp_dim,
        "first_k_dense_replace": len(dense),
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "n_shared_experts": shared // experts.mlp_dim,
        "routed_scaling_factor": experts.weight_scale,
        "n_group": experts.groups,
        "topk_group": experts.groups_per_token,
        "norm_topk_prob": experts.normalize_weights,
        "hidden_act": ACTIVATION_NAMES[experts.activation],
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "rope_theta": mixer.rope.theta,
        "rope_scaling": write_scaling(mixer.rope),
        "attention_bias": False,
    }
    return values, mixer, experts


def _write2(config: ModelConfig) -> dict[str, Any]:
    values, _, experts = _write(config)
    return {**values, "topk_method": "greedy" if experts.groups == 1 else "group_limited_greedy"}


def _write3(config: ModelConfig) -> dict[str, Any]:
    values, mixer, _ = _write(config)
    return {**values, "rope_interleave": mixer.interleaved}


def latent_tensors(mixer: LatentAttentionConfig) -> Table:
    """Latent attention."""
    queries = "q_proj" if mixer.q_rank is None else "q_b_proj"
    down, per_head = f"{_ATTENTION}.kv_a_proj_with_mqa.weight", "(h d) r -> r h d"
    return {
        **tensor_tables.norm("layers.mixer.q_norm", f"{_ATTENTION}.q_a_layernorm"),
        **tensor_tables.norm("layers.mixer.kv_norm", f"{_ATTENTION}.kv_a_layernorm"),
        "layers.mixer.q_down": (Source(f"{_ATTENTION}.q_a_proj.weight", "r e -> e r"),),
        "layers.mixer.q_up": (Source(f"{_ATTENTION}.{queries}.weight", per_head),),
        "layers.mixer.kv_down": (Source(down, "r e -> e r", rows=(0, mixer.kv_rank)),),
        "layers.mixer.k_rope": (Source(down, "r e -> e r", rows=(mixer.kv_rank, mixer.head_dim)),),
        "layers.mixer.kv_up": (Source(f"{_ATTENTION}.kv_b_proj.weight", per_head),),
        "layers.mixer.out": (Source(f"{_ATTENTION}.o_proj.weight", "e (h d) -> h d e"),),
    }


def _tensors(block: BlockConfig) -> Table:
    mixer = block.mixer
    assert isinstance(mixer, LatentAttentionConfig)
    table = {
        **tensor_tables.embedding_and_head("model.embed_tokens", "model.norm"),
        **tensor_tables.norm("layers.mixer_norm", f"{tensor_tables.BLOCK}.input_layernorm"),
        **tensor_tables.norm("layers.mlp_norm", f"{tensor_tables.BLOCK}.post_attention_layernorm"),
        **latent_tensors(mixer),
    }
    if not isinstance(block.mlp, ExpertsConfig):
        return {**table, **tensor_tables.gate_up(_MLP), **tensor_tables.down(f"{_MLP}.down_proj")}
    names = ("gate_proj", "up_proj", "down_proj")
    return {
        **table,
        **tensor_tables.experts(f"{_MLP}.gate", f"{_MLP}.experts", names),
        **tensor_tables.gate_up(f"{_MLP}.shared_experts", "layers.mlp.shared"),
        **tensor_tables.down(f"{_MLP}.shared_experts.down_proj", "layers.mlp.shared"),
        "layers.mlp.selection_bias": (Source(f"{_MLP}.gate.e_score_correction_bias", "x -> x"),),
    }


_PACKED = tensor_tables.packed_experts(f"{_MLP}.experts")
DEEPSEEK_V2 = Family(
    "deepseek_v2", ("DeepseekV2ForCausalLM",), ("deepseek_v2",), _read2, _write2, _tensors, packed=_PACKED
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    ("DeepseekV3ForCausalLM",),
    ("deepseek_v3",),
    _read3,
    _write3,
    _tensors,
    ignored=(r"^model\.layers\.61\.",),
    packed=_PACKED,
)
