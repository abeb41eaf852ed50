"""Nemotron-H (2504.03624): Mamba-2, some attention without positions, and plain MLPs with squared ReLUs.

A layer of a file is a mixer or an MLP alone. A mixer and the MLP behind it are one block here; a mixer that another one
follows is a block without an MLP. Experts (Nemotron 3) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    MixerConfig,
    ModelConfig,
    NormConfig,
    SSDConfig,
)
from streamjax.models.families import recurrent_tables, tensor_tables
from streamjax.models.families.config_fields import ACTIVATION_NAMES, Fields
from streamjax.models.families.family import Family, Table

_MIXER, _MLP = "backbone.layers.{layer}", "backbone.layers.{mlp_layer}"
_KINDS = {
    **{"M": "M", "mamba": "M", "linear_attention": "M", "*": "*", "attention": "*", "full_attention": "*"},
    **{"-": "-", "mlp": "-", "E": "E", "moe": "E"},
}
# Experts that are refused anyway, initial weights, kernels, and fields that transformers does not use.
_UNUSED = """
    chunk_size expand mamba_hidden_act mamba_ssm_cache_dtype moe_intermediate_size moe_latent_size
    moe_shared_expert_intermediate_size moe_shared_expert_overlap mtp_hybrid_override_pattern mtp_layers_block_type
    n_group
    n_routed_experts n_shared_experts norm_topk_prob num_experts_per_tok num_logits_to_keep rescale_prenorm_residual
    residual_in_fp32 routed_scaling_factor time_step_floor time_step_limit time_step_max time_step_rank topk_group
    use_mamba_kernels mamba_proj_bias num_hidden_layers
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
        raise ValueError(f"field {name!r} has {wrong!r:.40}; streamjax has M (Mamba-2), * (attention) and - (MLP)")
    letters = [_KINDS[kind] for kind in given]
    if "E" in letters:
        raise ValueError(f"field {name!r} has layers of experts, which streamjax does not implement for this family")
    if not letters:
        raise ValueError(f"field {name!r} has no layers")
    before = ["-", *letters]
    if any(one == other == "-" for one, other in zip(before, letters, strict=False)):
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
    blocks, mixers = list[BlockConfig](), dict[str, MixerConfig]({"M": space, "*": attention})
    for kind in _read_kinds(fields):
        if kind in mixers:
            blocks.append(BlockConfig(mixers[kind], None, norm))
        else:
            blocks[-1] = BlockConfig(blocks[-1].mixer, mlp, norm)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 131072),
        d_model=d_model,
        blocks=tuple(blocks),
        family="nemotron_h",
        norm=norm,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=fields.integer("max_position_embeddings", 4096),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    mixers = [block.mixer for block in config.blocks]
    space = next((mixer for mixer in mixers if isinstance(mixer, SSDConfig)), None)
    attention = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    mlp = next((block.mlp for block in config.blocks if isinstance(block.mlp, DenseConfig)), None)
    space = SSDConfig(1, 1, 8, 8, step_min=0.001) if space is None else space
    attention = AttentionConfig(1, 1, 8, rope=None) if attention is None else attention
    mlp = DenseConfig(8, gated=False, activation="relu2") if mlp is None else mlp
    letters = ["M" if block.mixer.recurrent else "*" for block in config.blocks]
    pattern = "".join(
        letter + "-" * (block.mlp is not None) for letter, block in zip(letters, config.blocks, strict=True)
    )
    return {
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
        **tensor_tables.ends("backbone.embeddings", "backbone.norm_f"),
        **tensor_tables.norm("layers.mixer_norm", f"{_MIXER}.norm"),
        **tensor_tables.norm("layers.mlp_norm", f"{_MLP}.norm"),
        **tensor_tables.up(f"{mlp}.up_proj"),
        **tensor_tables.down(f"{mlp}.down_proj"),
    }
    if isinstance(block.mixer, SSDConfig):
        return {**table, **recurrent_tables.ssd(block.mixer, mixer)}
    return {**table, **tensor_tables.qkv(block, mixer), **tensor_tables.out(f"{mixer}.o_proj")}


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
    numbers=_numbers,
)
