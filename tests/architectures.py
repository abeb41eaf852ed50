"""A tiny Hugging Face config of every architecture that the library loads, and of every layout that it has."""

from streamjax.models import ModelConfig
from streamjax.models.families import read_config

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 6, "query_pre_attn_scalar": 5, "sliding_window": 6}
FALCON = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
QWEN_MOE = {**GROUPED, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
LATENT = {
    **SIZES, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 6, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
LINEAR_FIRST = ["linear_attention", "full_attention"]
MIXED = ["sliding_attention", "full_attention"]

CASES = {
    "llama": {**GROUPED, "max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    "mistral": {**GROUPED, "sliding_window": 7},
    "mixtral": {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 7},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**GROUPED, "num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": True},
    "qwen2_moe": {**QWEN_MOE, "shared_expert_intermediate_size": 10, "mlp_only_layers": [1]},
    "qwen3_moe": {**QWEN_MOE, "norm_topk_prob": True, "decoder_sparse_step": 2, "head_dim": 6},
    "phi3": {**GROUPED, "sliding_window": 9},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "layer_types": MIXED},
    "gemma3": {**GEMMA, "layer_types": MIXED},
    "gpt_oss": {
        **{**GROUPED, "head_dim": 6, "sliding_window": 6, "rope_scaling": {"rope_type": "default"}},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.5},
    },
    "gpt_neox": {**SIZES, "rotary_pct": 0.5},
    "falcon-7b": FALCON,
    "falcon-40b": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    "falcon-alibi": {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "smollm3": {**GROUPED, "no_rope_layers": [0, 1]},
    "olmo2": {**GROUPED},
    "olmo3": {**GROUPED, "sliding_window": 6, "layer_types": MIXED},
    "granite": {**GROUPED, "residual_multiplier": 0.4, "logits_scaling": 0.5, "embedding_multiplier": 2.0},
    "cohere2": {**GROUPED, "sliding_window": 6, "layer_types": MIXED},
    "glm4": {**GROUPED, "head_dim": 8},
    "exaone4": {**GROUPED, "sliding_window": 6, "layer_types": MIXED},
    "starcoder2": {**GROUPED, "sliding_window": 7},
    "ministral3": {
        **GROUPED,
        "head_dim": 6,
        "rope_parameters": {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 4},
    },
    "llama4": {
        **{**GROUPED, "head_dim": 6, "intermediate_size_mlp": 20, "no_rope_layers": [1, 0], "moe_layers": [0]},
        **{"attention_chunk_size": 7, "floor_scale": 4, "attn_scale": 0.3, "num_local_experts": 3},
    },
    "gemma4": {
        **{**GROUPED, "head_dim": 6, "global_head_dim": 8, "sliding_window": 6, "layer_types": MIXED},
        **{"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "final_logit_softcapping": 3.0},
    },
    "gemma4-experts": {
        **{**GROUPED, "head_dim": 6, "global_head_dim": 8, "sliding_window": 6, "layer_types": MIXED},
        **{"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
        "moe_intermediate_size": 5,
    },
    "gemma4-shared": {
        **{**GROUPED, "num_hidden_layers": 4, "head_dim": 6, "global_head_dim": 8, "sliding_window": 6},
        **{"layer_types": MIXED * 2, "hidden_size_per_layer_input": 3, "vocab_size_per_layer_input": 31},
        **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    },
    "deepseek_v2": {
        **LATENT,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
    },
    "deepseek_v3": {**LATENT, "q_lora_rank": 7, "n_group": 2, "topk_group": 1},
    "qwen3_next": {
        **{**QWEN_MOE, "head_dim": 8, "shared_expert_intermediate_size": 10, "mlp_only_layers": [1]},
        **{"layer_types": LINEAR_FIRST, "linear_num_value_heads": 4},
        **{"linear_num_key_heads": 2, "linear_key_head_dim": 5, "linear_value_head_dim": 6},
    },
    "qwen3_5": {
        **{
            **GROUPED,
            "head_dim": 8,
            "layer_types": ["full_attention", "linear_attention"],
            "linear_num_value_heads": 2,
        },
        **{"linear_num_key_heads": 2, "linear_key_head_dim": 5, "linear_value_head_dim": 6},
    },
    "granitemoehybrid": {
        **{**GROUPED, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_state": 6},
        **{
            "num_local_experts": 4,
            "shared_intermediate_size": 10,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
        },
    },
    "mamba2": {
        **{"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "n_groups": 2},
        "state_size": 6,
    },
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {
        **{**GROUPED, "layer_types": ["full_attention", "conv"], "num_experts": 5, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 6, "num_dense_layers": 1},
    },
    "qwen3_5_moe": {
        **{**QWEN_MOE, "head_dim": 8, "shared_expert_intermediate_size": 10, "layer_types": LINEAR_FIRST},
        **{
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 5,
            "linear_value_head_dim": 6,
        },
    },
    "olmo_hybrid": {
        **{**GROUPED, "layer_types": LINEAR_FIRST, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
        **{"linear_key_head_dim": 5, "linear_value_head_dim": 6},
    },
    "kimi_linear": {
        **{name: size for name, size in LATENT.items() if name not in ("n_routed_experts", "first_k_dense_replace")},
        **{"layer_types": LINEAR_FIRST, "num_experts": 4, "linear_num_heads": 2, "linear_head_dim": 5},
    },
    "recurrent_gemma": {
        **GROUPED,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 6,
        "lru_width": 8,
    },
    "nemotron_h": {
        **{**GROUPED, "hybrid_override_pattern": "M*-", "head_dim": 6, "mamba_num_heads": 4, "mamba_head_dim": 6},
        **{"n_groups": 2, "ssm_state_size": 5},
    },
    "nemotron_h-experts": {
        **{**GROUPED, "hybrid_override_pattern": "*EM", "head_dim": 6, "mamba_num_heads": 4, "mamba_head_dim": 6},
        **{"n_groups": 2, "ssm_state_size": 5, "n_routed_experts": 6, "n_group": 3, "topk_group": 2},
        **{"moe_intermediate_size": 6, "moe_shared_expert_intermediate_size": 10, "routed_scaling_factor": 1.5},
        **{"moe_latent_size": 8, "mlp_bias": True},
    },
    "rwkv7": {
        **{"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8},
        **{"decay_low_rank_dim": 3, "a_low_rank_dim": 2, "gate_low_rank_dim": 5, "v_low_rank_dim": 4},
    },
    "gla": {**{"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_heads": 2}},
    "falcon_h1": {
        **{**GROUPED, "mamba_d_ssm": 20, "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 5},
        **{"ssm_multipliers": [0.5, 1.2, 0.9, 1.1, 0.8], "ssm_out_multiplier": 0.7, "mlp_multipliers": [0.7, 1.3]},
        **{"attention_in_multiplier": 1.4, "attention_out_multiplier": 0.8, "key_multiplier": 0.6},
    },
    "mpt": {"vocab_size": 31, "d_model": 16, "n_layers": 2, "n_heads": 4, "attn_config": {"clip_qkv": 0.5}},
}


def tiny_config(case: str) -> ModelConfig:
    """The model of a case; its name starts with the family's."""
    kind = case.split("-")[0]
    kind += "_text" if kind in ("gemma3", "llama4", "gemma4", "qwen3_5", "qwen3_5_moe") else ""
    return read_config({**CASES[case], "model_type": kind})


def different_layers(config: ModelConfig) -> ModelConfig:
    """The model with one layer where all of them are alike: for what each layer does by itself."""
    return config.replace(blocks=config.blocks[:1]) if len(set(config.blocks)) == 1 else config


def changes_with_length(config: ModelConfig) -> bool:
    """Whether a rotation depends on the length of the sequence, or in a stream on the span of the cache."""
    ropes = [block.mixer.rope for block in config.blocks]
    return any(rope is not None and rope.kind == "dynamic" for rope in ropes)
