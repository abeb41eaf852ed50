"""Tiny configs of transformers, over the shapes and switches that each architecture has."""

import transformers as hf

from tests.models.families import recurrent_peers

SIZES = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "pad_token_id": None}
BASE = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
NEOX = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
FALCON = {k: v for k, v in NEOX.items() if k != "intermediate_size"}
MPT = {"vocab_size": 101, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
LONG = {"original_max_position_embeddings": 16, "rope_theta": 10_000.0}
SHORT_FACTORS, LONG_FACTORS = [1.0, 1.1, 1.2, 1.3, 1.5, 2.0], [1.0, 1.5, 2.5, 4.0, 6.0, 9.0]
PARTIAL_FACTORS = {"short_factor": [1.0, 1.25, 1.5, 3.0], "long_factor": [1.0, 2.0, 5.0, 8.0]}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG}
YARN = {"rope_type": "yarn", "factor": 4.0, **LONG}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS, **LONG}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10_000.0}


MORE = {"bos_token_id": 1, "eos_token_id": 2}
FOUR = {**BASE, "num_hidden_layers": 4}


def llama(**options):
    return hf.LlamaConfig(**{**BASE, **options})


def qwen_moe(cls, **options):
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    sizes |= {"shared_expert_intermediate_size": 20} if cls is hf.Qwen2MoeConfig else {}
    return cls(**{**BASE, **sizes, **options})


def gpt_oss(**options):
    sizes = {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6, "head_dim": 12, "vocab_size": 101}
    return hf.GptOssConfig(**{**BASE, "bos_token_id": None, "eos_token_id": 3, **sizes, **options})


def llama4(**options):
    sizes = {"head_dim": 12, "intermediate_size_mlp": 40, "attention_chunk_size": 8, "num_local_experts": 5}
    tuned = {"floor_scale": 6, "attn_scale": 0.3}
    return hf.Llama4TextConfig(**{**FOUR, **MORE, **sizes, **tuned, **options})


def gemma4(**options):
    sizes = {"head_dim": 12, "global_head_dim": 16, "sliding_window": 6, "hidden_size_per_layer_input": 0}
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return hf.Gemma4TextConfig(**{**FOUR, **MORE, **sizes, "layer_types": types, **options})


GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 12}


def phi3(**options):
    return hf.Phi3Config(**{**BASE, "bos_token_id": 1, "eos_token_id": 2, **options})


def gemma(cls, **options):
    scale = {"query_pre_attn_scalar": 20, "sliding_window": 6, "hidden_activation": "gelu_pytorch_tanh"}
    return cls(**{**BASE, "num_hidden_layers": 3, "head_dim": 12, **scale, **options})


def falcon(**options):
    return hf.FalconConfig(**{**FALCON, "bos_token_id": 1, "eos_token_id": 2, **options})


def mpt(attn_config=None, **options):
    return hf.MptConfig(**{**MPT, **options}, attn_config=attn_config or {})


def latent(kind, **changes):
    sizes = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10}
    experts = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 2}
    routing = {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
    return kind(**{**BASE, "num_key_value_heads": 4, **sizes, **experts, **routing, **changes})


CASES = {
    "llama-gqa-biases": lambda: llama(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "llama-mqa-tied": lambda: llama(num_key_value_heads=1, tie_word_embeddings=True, hidden_act="gelu"),
    "llama-mha-wide-heads": lambda: llama(num_key_value_heads=4, head_dim=24, rope_parameters={"rope_theta": 500.0}),
    "llama-linear": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 10_000.0}),
    "llama-llama3": lambda: llama(rope_parameters=LLAMA3),
    "llama-yarn": lambda: llama(rope_parameters=YARN),
    "llama-dynamic": lambda: llama(max_position_embeddings=16, rope_parameters=DYNAMIC),
    "llama-longrope": lambda: llama(rope_parameters=LONGROPE),
    "mistral-window": lambda: hf.MistralConfig(**BASE, sliding_window=7, head_dim=20),
    "mistral-full": lambda: hf.MistralConfig(**BASE, sliding_window=None),
    "mixtral": lambda: hf.MixtralConfig(**BASE, num_local_experts=5, num_experts_per_tok=2),
    "mixtral-window": lambda: hf.MixtralConfig(**BASE, num_local_experts=3, sliding_window=7, head_dim=20),
    "mixtral-all-tied": lambda: hf.MixtralConfig(
        **BASE, num_local_experts=4, num_experts_per_tok=4, tie_word_embeddings=True, hidden_act="gelu"
    ),
    "gpt_oss": lambda: gpt_oss(),
    "gpt_oss-all-clamped": lambda: gpt_oss(num_experts_per_tok=5, swiglu_limit=0.4, swiglu_alpha=1.1),
    "gpt_oss-mqa-no-biases": lambda: gpt_oss(
        num_key_value_heads=1, attention_bias=False, tie_word_embeddings=True, layer_types=["full_attention"] * 2
    ),
    "gpt_oss-plain-rope": lambda: gpt_oss(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "qwen2": lambda: hf.Qwen2Config(**BASE, tie_word_embeddings=True),
    "qwen2-window": lambda: hf.Qwen2Config(**BASE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**BASE, head_dim=20, tie_word_embeddings=True),
    "qwen3-biases": lambda: hf.Qwen3Config(**{**BASE, "num_key_value_heads": 1}, head_dim=12, attention_bias=True),
    "qwen2_moe": lambda: qwen_moe(hf.Qwen2MoeConfig),
    "qwen2_moe-window": lambda: qwen_moe(
        hf.Qwen2MoeConfig, use_sliding_window=True, sliding_window=5, decoder_sparse_step=2, norm_topk_prob=True
    ),
    "qwen2_moe-dense-no-biases": lambda: qwen_moe(
        hf.Qwen2MoeConfig, num_key_value_heads=4, mlp_only_layers=[0], qkv_bias=False, tie_word_embeddings=True
    ),
    "qwen3_moe": lambda: qwen_moe(hf.Qwen3MoeConfig, norm_topk_prob=True, head_dim=20),
    "qwen3_moe-dense-biases": lambda: qwen_moe(hf.Qwen3MoeConfig, mlp_only_layers=[1], attention_bias=True),
    "qwen3_moe-window": lambda: qwen_moe(
        hf.Qwen3MoeConfig, use_sliding_window=True, sliding_window=7, tie_word_embeddings=True, num_key_value_heads=1
    ),
    "phi3": lambda: phi3(sliding_window=9),
    "phi3-partial": lambda: phi3(head_dim=20, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.4}),
    "phi3-longrope-partial": lambda: phi3(
        hidden_size=64,
        original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, **PARTIAL_FACTORS},
    ),
    "gemma2": lambda: gemma(hf.Gemma2Config, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2-biases-untied": lambda: gemma(hf.Gemma2Config, attention_bias=True, tie_word_embeddings=False),
    "gemma2-full": lambda: gemma(hf.Gemma2Config, layer_types=["full_attention"] * 3),
    "gemma3": lambda: gemma(
        hf.Gemma3TextConfig, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gemma3-linear": lambda: gemma(
        hf.Gemma3TextConfig,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=4.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
        },
    ),
    "deepseek_v2": lambda: latent(hf.DeepseekV2Config, q_lora_rank=None),
    "deepseek_v2-groups": lambda: latent(
        hf.DeepseekV2Config,
        q_lora_rank=12,
        topk_method="group_limited_greedy",
        n_group=3,
        topk_group=2,
        tie_word_embeddings=True,
    ),
    "deepseek_v3": lambda: latent(hf.DeepseekV3Config, q_lora_rank=12, n_group=2, topk_group=1),
    "deepseek_v3-yarn": lambda: latent(
        hf.DeepseekV3Config,
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        rope_parameters={**YARN, "mscale": 0.8, "mscale_all_dim": 0.6},
    ),
    "llama4": lambda: llama4(interleave_moe_layer_step=2, rope_parameters={**LLAMA3, "high_freq_factor": 1.0}),
    "llama4-two-experts-no-norm": lambda: llama4(
        num_experts_per_tok=2, use_qk_norm=False, num_key_value_heads=1, tie_word_embeddings=True, hidden_act="gelu"
    ),
    "llama4-dense-biases-flat": lambda: llama4(
        moe_layers=[], attention_bias=True, attn_temperature_tuning=False, attention_chunk_size=None, floor_scale=3
    ),
    "llama4-layer-types": lambda: llama4(
        layer_types=["full_attention", "chunked_attention"] * 2, no_rope_layers=[1, 0, 0, 1], head_dim=20
    ),
    "gemma4": lambda: gemma4(attention_k_eq_v=True, num_global_key_value_heads=1, final_logit_softcapping=3.0),
    "gemma4-shared": lambda: gemma4(
        num_hidden_layers=5,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=5,
        vocab_size_per_layer_input=FOUR["vocab_size"],
        use_double_wide_mlp=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma4-experts": lambda: gemma4(**GEMMA4_EXPERTS, attention_k_eq_v=True, num_global_key_value_heads=4),
    "gemma4-biases-untied": lambda: gemma4(attention_bias=True, attention_k_eq_v=True, tie_word_embeddings=False),
    "gemma4-unified": lambda: hf.Gemma4UnifiedTextConfig(
        **{**FOUR, **MORE, "num_key_value_heads": 4},
        head_dim=12,
        global_head_dim=16,
        sliding_window=6,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma4-experts-all-values": lambda: gemma4(
        **{**GEMMA4_EXPERTS, "top_k_experts": 5},
        num_key_value_heads=1,
        global_head_dim=24,
        rope_parameters={
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.4,
                "rope_theta": 500.0,
                "factor": 2.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**NEOX),
    "gpt_neox-sequential": lambda: hf.GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new"
    ),
    "gpt_neox-partial-linear": lambda: hf.GPTNeoXConfig(
        **NEOX, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3, "partial_rotary_factor": 0.5}
    ),
    "falcon-7b": lambda: falcon(),
    "falcon-40b": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False),
    "falcon-11b": lambda: falcon(
        new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=72, bias=True
    ),
    "falcon-rw": lambda: falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "falcon-alibi-mqa-parallel": lambda: falcon(alibi=True, num_attention_heads=8, activation="relu"),
    "smollm3": lambda: hf.SmolLM3Config(**FOUR, bos_token_id=1, eos_token_id=2),
    "smollm3-window-biases": lambda: hf.SmolLM3Config(
        **{**BASE, "num_key_value_heads": 1},
        **{**MORE, "no_rope_layers": [0, 1]},
        use_sliding_window=True,
        sliding_window=5,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "olmo2": lambda: hf.Olmo2Config(**BASE, **MORE),
    "olmo2-mha-biases-tied": lambda: hf.Olmo2Config(
        **{**BASE, "num_key_value_heads": 4}, **MORE, attention_bias=True, tie_word_embeddings=True
    ),
    "olmo2-yarn": lambda: hf.Olmo2Config(**BASE, **MORE, rope_parameters=YARN),
    "olmo3": lambda: hf.Olmo3Config(**FOUR, **MORE, sliding_window=6),
    "olmo3-full": lambda: hf.Olmo3Config(**BASE, **MORE, layer_types=["full_attention"] * 2),
    "olmo3-yarn": lambda: hf.Olmo3Config(
        **BASE,
        **MORE,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "granite": lambda: hf.GraniteConfig(
        **BASE,
        embedding_multiplier=12.0,
        attention_multiplier=0.2,
        residual_multiplier=0.22,
        logits_scaling=7.0,
        tie_word_embeddings=True,
    ),
    "granite-biases": lambda: hf.GraniteConfig(**BASE, attention_bias=True, mlp_bias=True, logits_scaling=49.0),
    "cohere2": lambda: hf.Cohere2Config(**FOUR, **MORE, sliding_window=6, logit_scale=0.3),
    "cohere2-mqa-biases-untied": lambda: hf.Cohere2Config(
        **{**BASE, "num_key_value_heads": 1},
        **MORE,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "cohere2-full": lambda: hf.Cohere2Config(**BASE, **MORE, layer_types=["full_attention"] * 2),
    "glm4": lambda: hf.Glm4Config(**BASE, **MORE, head_dim=12),
    "glm4-mqa-partial": lambda: hf.Glm4Config(
        **{**BASE, "num_key_value_heads": 1},
        **MORE,
        head_dim=20,
        attention_bias=False,
        rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.4},
    ),
    "glm4-whole-heads": lambda: hf.Glm4Config(
        **{**BASE, "num_key_value_heads": 4}, **MORE, head_dim=12, rope_parameters={"partial_rotary_factor": 1.0}
    ),
    "exaone4": lambda: hf.Exaone4Config(**FOUR, **MORE, sliding_window=6),
    "exaone4-full": lambda: hf.Exaone4Config(
        **BASE, **MORE, sliding_window=None, layer_types=["full_attention"] * 2, rope_parameters=LLAMA3
    ),
    "exaone4-no-position": lambda: hf.Exaone4Config(
        **BASE, **MORE, sliding_window=6, layer_types=["full_attention"] * 2, tie_word_embeddings=True
    ),
    "starcoder2": lambda: hf.Starcoder2Config(**BASE, **MORE, sliding_window=7),
    "starcoder2-plain": lambda: hf.Starcoder2Config(
        **{**BASE, "num_key_value_heads": 1}, **MORE, use_bias=False, hidden_act="relu", tie_word_embeddings=False
    ),
    "ministral3": lambda: hf.Ministral3Config(
        **BASE, **MORE, head_dim=12, rope_parameters={**YARN, "llama_4_scaling_beta": 0.3}
    ),
    "ministral3-default-window": lambda: hf.Ministral3Config(
        **BASE, **MORE, sliding_window=7, tie_word_embeddings=True
    ),
    "ministral3-plain": lambda: hf.Ministral3Config(
        **BASE,
        **MORE,
        head_dim=20,
        rope_parameters={"rope_type": "default", **LONG, "llama_4_scaling_beta": 0.0},
    ),
    "mpt": lambda: mpt(),
    "mpt-clip-scale": lambda: mpt({"clip_qkv": 0.5, "softmax_scale": 0.2}),
    "mpt-six-heads-untied": lambda: mpt(n_heads=6, tie_word_embeddings=False),
}
CASES |= recurrent_peers.CASES
