"""Tiny configs of recurrent and hybrid architectures, over the shapes and switches that they have."""

import transformers as hf

SIZES = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "pad_token_id": None}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10}
TOLERANCE = 2e-4  # a norm of what a head reads enlarges rounding: theirs lies further from float64 than ours
MIXED = ["linear_attention", "full_attention"]


def mamba2(**options):
    sizes = {"num_heads": 6, "head_dim": 16, "state_size": 10, "n_groups": 3, "chunk_size": 16}
    return hf.Mamba2Config(**{**SIZES, **sizes, "bos_token_id": 1, "eos_token_id": 2, **options})


def qwen3_next(**options):
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    experts |= {"shared_expert_intermediate_size": 20, "intermediate_size": 56}
    return hf.Qwen3NextConfig(
        **{**SIZES, **ATTENTION, **LINEAR, **experts, "head_dim": 16, "layer_types": MIXED, **options}
    )


def granite(**options):
    sizes = {"intermediate_size": 16, "shared_intermediate_size": 20, "num_local_experts": 5, "num_experts_per_tok": 2}
    sizes |= {"mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 10, "layer_types": ["mamba", "attention"]}
    factors = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}
    factors |= {"logits_scaling": 2.0}
    return hf.GraniteMoeHybridConfig(**{**SIZES, **ATTENTION, **sizes, **factors, **options})


def qwen3_5(**options):
    sizes = {**SIZES, **ATTENTION, **LINEAR, "intermediate_size": 56, "head_dim": 16, "layer_types": MIXED}
    return hf.models.qwen3_5.Qwen3_5TextConfig(**{**sizes, **options})


def lfm2(kind=None, **options):
    sizes = {"intermediate_size": 56, "layer_types": ["conv", "full_attention"], "bos_token_id": 1, "eos_token_id": 2}
    return (kind or hf.Lfm2Config)(**{**SIZES, **ATTENTION, **sizes, **options})


def lfm2_moe(**options):
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_dense_layers": 1}
    return lfm2(hf.Lfm2MoeConfig, **{**experts, "layer_types": ["full_attention", "conv"], **options})


def qwen3_5_moe(**options):
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    experts |= {"shared_expert_intermediate_size": 20}
    sizes = {**SIZES, **ATTENTION, **LINEAR, **experts, "head_dim": 16, "layer_types": MIXED}
    return hf.models.qwen3_5_moe.Qwen3_5MoeTextConfig(**{**sizes, **options})


def olmo_hybrid(**options):
    return hf.OlmoHybridConfig(**{**SIZES, **ATTENTION, "intermediate_size": 56, "eos_token_id": 2, **options})


def kimi_linear(**options):
    sizes = {"linear_num_heads": 3, "linear_head_dim": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
    sizes |= {"qk_nope_head_dim": 12, "v_head_dim": 10, "num_key_value_heads": 4, "intermediate_size": 56}
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 2}
    return hf.models.kimi_linear.KimiLinearConfig(
        **{**SIZES, **ATTENTION, **sizes, **experts, "bos_token_id": 1, "eos_token_id": 2, **options}
    )


def recurrent_gemma(**options):
    sizes = {"lru_width": 40, "attention_window_size": 6, "intermediate_size": 56, "num_hidden_layers": 3}
    return hf.RecurrentGemmaConfig(**{**SIZES, **ATTENTION, **sizes, **options})


def nemotron_h(pattern, **options):
    sizes = {"mamba_num_heads": 6, "mamba_head_dim": 16, "n_groups": 3, "ssm_state_size": 10, "head_dim": 12}
    given = {**SIZES, **ATTENTION, **sizes, "intermediate_size": 56, "hybrid_override_pattern": pattern, **options}
    return hf.NemotronHConfig(**{**given, "num_hidden_layers": len(pattern)})


NEMOTRON_EXPERTS = {
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "routed_scaling_factor": 2.5},
    "moe_shared_expert_intermediate_size": 20,
}


def falcon_h1(**options):
    sizes = {"intermediate_size": 56, "mamba_d_ssm": 60, "mamba_n_heads": 6, "mamba_d_head": 10, "mamba_n_groups": 3}
    sizes |= {"mamba_d_state": 10, "mamba_chunk_size": 16}
    factors = {"embedding_multiplier": 3.0, "lm_head_multiplier": 0.5, "mlp_multipliers": [0.7, 1.3]}
    factors |= {"key_multiplier": 0.6, "attention_in_multiplier": 1.4, "attention_out_multiplier": 0.8}
    factors |= {"ssm_multipliers": [0.5, 1.2, 0.9, 1.1, 0.8], "ssm_in_multiplier": 1.5, "ssm_out_multiplier": 0.7}
    return hf.FalconH1Config(**{**SIZES, **ATTENTION, **sizes, **factors, **options})


CASES = {
    "falcon_h1": falcon_h1,
    "falcon_h1-normed-biases-tied": lambda: falcon_h1(
        mamba_rms_norm=True, mamba_norm_before_gate=False, mlp_bias=True, mamba_conv_bias=False,
        tie_word_embeddings=True, mamba_d_ssm=None, mamba_d_head=16,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "nemotron_h": lambda: nemotron_h("MM-*-M"),
    "nemotron_h-latent-biases": lambda: nemotron_h(
        "*EM-", **NEMOTRON_EXPERTS, moe_latent_size=16, mlp_bias=True, n_group=3, topk_group=2,
    ),
    "nemotron_h-biases": lambda: nemotron_h(
        "*-M-", use_bias=True, mlp_bias=True, use_conv_bias=False, mlp_hidden_act="gelu",
        time_step_min=0.5,
    ),
    "nemotron_h-experts": lambda: nemotron_h("MEM*E", **NEMOTRON_EXPERTS),
    "recurrent_gemma": lambda: recurrent_gemma(num_key_value_heads=1),
    "recurrent_gemma-biases-untied": lambda: recurrent_gemma(
        attention_bias=True, block_types=["attention", "recurrent"], logits_soft_cap=2.0, conv1d_width=3,
    ),
    "olmo_hybrid": lambda: olmo_hybrid(linear_num_key_heads=2, linear_key_head_dim=12, linear_value_head_dim=6),
    "olmo_hybrid-unturned": lambda: olmo_hybrid(
        layer_types=MIXED[::-1], linear_value_head_dim=9, linear_allow_neg_eigval=False, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": None},
    ),
    "kimi_linear": lambda: kimi_linear(layer_types=MIXED),
    "kimi_linear-older-fields": lambda: kimi_linear(
        q_lora_rank=14, n_group=1, n_shared_experts=2, norm_topk_prob=False,
        linear_attn_config={"full_attn_layers": [1], "kda_layers": [2], "num_heads": 2, "head_dim": 10},
    ),
    "qwen3_5_moe": qwen3_5_moe,
    "lfm2": lambda: lfm2(block_multiple_of=16),
    "lfm2-biases-untied": lambda: lfm2(
        conv_bias=True, conv_L_cache=4, tie_word_embeddings=False, block_auto_adjust_ff_dim=False, layer_types=None,
        full_attn_idxs=[0],
    ),
    "lfm2_moe": lfm2_moe,
    "lfm2_moe-no-bias": lambda: lfm2_moe(use_expert_bias=False, norm_topk_prob=False, routed_scaling_factor=1.5),
    "granitemoehybrid": granite,
    "granitemoehybrid-dense-rope": lambda: granite(
        num_local_experts=0, num_experts_per_tok=0, position_embedding_type="rope", mamba_n_groups=1,
        tie_word_embeddings=True, mamba_proj_bias=True,
    ),
    "qwen3_5": lambda: qwen3_5(tie_word_embeddings=True),
    "mamba2": mamba2,
    "mamba2-one-group-biases-tied": lambda: mamba2(
        n_groups=1, use_bias=True, use_conv_bias=False, tie_word_embeddings=True, time_step_limit=[0.3, 0.9]
    ),
    "qwen3_next": qwen3_next,
    "qwen3_next-dense-whole-rope": lambda: qwen3_next(
        mlp_only_layers=[0], attention_bias=True, norm_topk_prob=False,
        linear_num_key_heads=4, linear_conv_kernel_dim=3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        tie_word_embeddings=True,
    ),
}  # fmt: skip
