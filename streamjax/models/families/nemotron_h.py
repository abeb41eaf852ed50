"""Nemotron-H and Nemotron 3 (2504.03624): Mamba-2, some attention without positions, MLPs or experts, squared ReLUs.

A layer of a file is a mixer, an MLP or a mixture of experts alone. A mixer and what is no mixer behind it are one block
here; a mixer that another one follows is a block without an MLP. Experts (Nemotron 3) are MLPs without gates, chosen by
DeepSeek-V3's rule, beside an expert that every token passes through; on request they read a latent of the token. Layers
for the prediction of several tokens are left alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    ExpertsConfig,
    MixerConfig,
    ModelConfig,
    NormConfig,
    SSDConfig,
)
from streamjax.models.families import recurrent_tables, tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields
from streamjax.models.families.family import Family, Source, Table

_MIXER, _MLP = "backbone.layers.{layer}", "backbone.layers.{mlp_layer}"
_UP = "(g f) e -> e g f"
_EXPERTS = """
    moe_intermediate_size moe_latent_size moe_shared_expert_intermediate_size n_group n_routed_experts norm_topk_prob
    num_experts_per_tok routed_scaling_factor topk_group
"""
_KINDS = {
    **{"M": "M", "mamba": "M", "linear_attention": "M", "*": "*", "attention": "*", "full_attention": "*"},
    **{"-": "-", "mlp": "-", "E": "E", "moe": "E"},
}
# Initial weights, kernels, several tokens at once, and fields that transformers does not use.
_UNUSED = """
    chunk_size expand mamba_hidden_act mamba_ssm_cache_dtype moe_shared_expert_overlap mtp_hybrid_override_pattern
    mtp_layers_block_type n_shared_experts num_logits_to_keep num_nextn_predict_layers rescale_prenorm_residual
    residual_in_fp32 time_step_floor time_step_limit time_step_max time_step_rank use_mamba_kernels mamba_proj_bias
    num_hidden_layers
"""


def _read_kinds(fields: Fields) -> list[str]:
    """The letter of each layer of the file."""
    kinds = fields.get("layers_block_type", list, None)
    pattern = fields.get("hybrid_override_pattern", str, None)
    name, given = ("layers_block_type", kinds) if kinds is not None else ("hybrid_override_pattern", pattern)
    if given is None:
        raise ValueError("field 'hybrid_override_pattern' is missing")
    wrong = next((kind for kind in given if not isinstance(kind, str) or kind not in _KINDS), None)
    if wrong is not None:
        raise ValueError(
            f"field {name!r} has {wrong!r:.40}; streamjax has M (Mamba-2), * (attention), - (MLP), E (experts)"
        )
    letters = [_KINDS[kind] for kind in given]
    if not letters:
        raise ValueError(f"field {name!r} has no layers")
    before = ["-", *letters]
    if any(one in "-E" and other in "-E" for one, other in zip(before, letters, strict=False)):
        raise ValueError(
            f"field {name!r} has an MLP without a mixer in front of it, which streamjax does not implement"
        )
    return letters


def _read(fields: Fields) -> ModelConfig:
    fields.seen.update(_UNUSED.split())
    fields.only("mamba_hidden_act", ("silu", "swish"), "silu")
    fields.only("attention_bias", (None, False))
    fields.only("sliding_window", (None,))
    norm, d_model = NormConfig("rms", fields.positive("layer_norm_epsilon", 1e-5)), fields.integer("hidden_size", 4096)
    heads = fields.integer("num_attention_heads", 32)
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields.optional_integer("num_key_value_heads", 8) or heads,
        head_dim=fields.integer("head_dim", 128),
        rope=None,
    )
    space = SSDConfig(
        num_heads=fields.integer("mamba_num_heads", 128),
        num_groups=fields.integer("n_groups", 8),
        head_dim=fields.integer("mamba_head_dim", 64),
        state_dim=fields.integer("ssm_state_size", 128),
        conv_width=fields.integer("conv_kernel", 4),
        conv_bias=fields.flag("use_conv_bias", True),
        bias=fields.flag("use_bias", False),
        norm=norm,
        step_min=fields.positive("time_step_min", 0.001),
    )
    mlp = DenseConfig(
        fields.integer("intermediate_size", 21504),
        gated=False,
        activation=fields.activation("mlp_hidden_act", "relu2"),
        bias=fields.flag("mlp_bias", False),
    )
    blocks, mixers, kinds = (
        list[BlockConfig](),
        dict[str, MixerConfig]({"M": space, "*": attention}),
        _read_kinds(fields),
    )
    experts = _read_experts(fields, mlp, "E" in kinds)
    for kind in kinds:
        if kind in mixers:
            blocks.append(BlockConfig(mixers[kind], None, norm))
        else:
            blocks[-1] = BlockConfig(blocks[-1].mixer, experts if kind == "E" else mlp, norm)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 131072),
        d_model=d_model,
        blocks=tuple(blocks),
        family="nemotron_h",
        norm=norm,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=fields.integer("max_position_embeddings", 4096),
    )


def _read_experts(fields: Fields, mlp: DenseConfig, there: bool) -> ExpertsConfig | None:
    """The experts of every layer that has some; fields of models without are not looked at."""
    if not there:
        fields.seen.update(_EXPERTS.split())
        return None
    latent = fields.optional_integer("moe_latent_size")
    shared = fields.integer("moe_shared_expert_intermediate_size", 7688)
    return ExpertsConfig(
        num_experts=fields.integer("n_routed_experts", 8),
        experts_per_token=fields.integer("num_experts_per_tok", 2),
        mlp_dim=fields.integer("moe_intermediate_size", 7688),
        activation=mlp.activation,
        normalize_weights=fields.flag("norm_topk_prob", True),
        shared=dataclasses.replace(mlp, mlp_dim=shared),
        scores="sigmoid",
        groups=fields.integer("n_group", 1),
        groups_per_token=fields.integer("topk_group", 1),
        group_rank="two best",
        selection_bias=True,
        weight_scale=fields.positive("routed_scaling_factor", 1.0),
        gated=False,
        latent=latent,
        latent_bias=mlp.bias and latent is not None,
    )


def _write_experts(config: ModelConfig) -> dict[str, Any]:
    kinds = [block.mlp for block in config.blocks if isinstance(block.mlp, ExpertsConfig)]
    if not kinds:
        return {}
    experts = kinds[0]
    if experts.shared is None:
        raise ValueError("an expert that every token passes through is needed")
    return {
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.mlp_dim,
        "moe_shared_expert_intermediate_size": experts.shared.mlp_dim,
        "moe_latent_size": experts.latent,
        "n_shared_experts": 1,
        "n_group": experts.groups,
        "topk_group": experts.groups_per_token,
        "norm_topk_prob": experts.normalize_weights,
        "routed_scaling_factor": experts.weight_scale,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers = [block.mixer for block in config.blocks]
    space = next((mixer for mixer in mixers if isinstance(mixer, SSDConfig)), None)
    attention = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    mlp = next((block.mlp for block in config.blocks if isinstance(block.mlp, DenseConfig)), None)
    space = SSDConfig(1, 1, 8, 8, step_min=0.001) if space is None else space
    attention = AttentionConfig(1, 1, 8, rope=None) if attention is None else attention
    found = next((block.mlp for block in config.blocks if isinstance(block.mlp, ExpertsConfig)), None)
    if mlp is None:
        mlp = found.shared if found is not None and found.shared is not None else None
    mlp = DenseConfig(8, gated=False, activation="relu2") if mlp is None else mlp
    letters = ["M" if block.mixer.recurrent else "*" for block in config.blocks]
    behind = ["" if b.mlp is None else "E" if isinstance(b.mlp, ExpertsConfig) else "-" for b in config.blocks]
    pattern = "".join(itertools.chain.from_iterable(zip(letters, behind, strict=True)))
    return {
        **_write_experts(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(pattern),
        "hybrid_override_pattern": pattern,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "mamba_num_heads": space.num_heads,
        "mamba_head_dim": space.head_dim,
        "n_groups": space.num_groups,
        "ssm_state_size": space.state_dim,
        "conv_kernel": space.conv_width,
        "use_conv_bias": space.conv_bias,
        "use_bias": space.bias,
        "time_step_min": space.step_min,
        "intermediate_size": mlp.mlp_dim,
        "mlp_hidden_act": ACTIVATION_NAMES[mlp.activation],
        "mlp_bias": mlp.bias,
        "layer_norm_epsilon": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
    }


def _numbers(config: ModelConfig) -> Sequence[Mapping[str, int]]:
    """Which layers of the file a block is read from."""
    numbers, layer = [], 0
    for block in config.blocks:
        numbers.append({"layer": layer, "mlp_layer": layer + 1})
        layer += 1 if block.mlp is None else 2
    return numbers


def _tensors(block: BlockConfig) -> Table:
    mixer, mlp = f"{_MIXER}.mixer", f"{_MLP}.mixer"
    table = {
        **tensor_tables.embedding_and_head("backbone.embeddings", "backbone.norm_f"),
        **tensor_tables.norm("layers.mixer_norm", f"{_MIXER}.norm"),
        **tensor_tables.norm("layers.mlp_norm", f"{_MLP}.norm"),
        **tensor_tables.up(f"{mlp}.up_proj"),
        **tensor_tables.down(f"{mlp}.down_proj"),
    }
    if isinstance(block.mlp, ExpertsConfig):
        table |= {
            "layers.mlp.router": (Source(f"{mlp}.gate.weight", "x e -> e x"),),
            "layers.mlp.selection_bias": (Source(f"{mlp}.gate.e_score_correction_bias", "x -> x"),),
            "layers.mlp.up": (Source(f"{mlp}.experts.{{expert}}.up_proj.weight", "(x g f) e -> x e g f"),),
            "layers.mlp.down": (Source(f"{mlp}.experts.{{expert}}.down_proj.weight", "(x e) f -> x f e"),),
            **tensor_tables.fused("layers.mlp.shared.up", f"{mlp}.shared_experts.up_proj", _UP, "(g f) -> g f"),
            **tensor_tables.down(f"{mlp}.shared_experts.down_proj", "layers.mlp.shared"),
            **tensor_tables.fused("layers.mlp.latent_in", f"{mlp}.fc1_latent_proj", "l e -> e l", "l -> l"),
            **tensor_tables.fused("layers.mlp.latent_out", f"{mlp}.fc2_latent_proj", "e l -> l e", "e -> e"),
        }
    if isinstance(block.mixer, SSDConfig):
        return {**table, **recurrent_tables.ssd(block.mixer, mixer)}
    return {**table, **tensor_tables.qkv(block, mixer), **tensor_tables.out(f"{mixer}.o_proj")}


_PACKED = {  # as transformers 5 holds them
    "layers.mlp.up": (Source(f"{_MLP}.mixer.experts.up_proj", "x (g f) e -> x e g f"),),
    "layers.mlp.down": (Source(f"{_MLP}.mixer.experts.down_proj", "x e f -> x f e"),),
}
NEMOTRON_H = Family(
    "nemotron_h",
    ("NemotronHForCausalLM",),
    ("nemotron_h",),
    _read,
    _write,
    _tensors,
    renames=(  # as transformers 5 holds them
        (r"^backbone\.embedding\.", "backbone.embeddings."),
        (r"^model\.", "backbone."),
    ),
    ignored=(r"^mtp\.",),
    packed=_PACKED,
    numbers=_numbers,
)
