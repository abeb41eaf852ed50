"""What llama.cpp's converter makes of a Hugging Face model: names, orders of rows and metadata, for tiny models."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.gguf_files import write_gguf

NAMES = {"gpt_neox": "gptneox", "gemma3_text": "gemma3", "mistral": "llama", "mixtral": "llama", "olmo3": "olmo2"}
NAMES |= {"deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss", "ministral3": "mistral3"}
NAMES |= {"llama4_text": "llama4", "gemma4_text": "gemma4"}
NAMES |= {f"qwen{n}_moe": f"qwen{n}moe" for n in (2, 3)}
INTERLEAVED = ("llama", "granite", "smollm3", "mistral3")
EXPERTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def convert(
    model: torch.nn.Module,
    file: Path,
    experts: Any = None,
    without: tuple[str, ...] = (),
    whole: bool = False,
    **more: Any,
) -> Path:
    """Write the GGUF file of a model.

    `experts` are in that kind of blocks; tensors are left out that are named in `without`; keys and values of latents
    stay in one tensor, as older files have them, where they are `whole`; `more` are further metadata, none
    where they are None, and tensors by their names in the file.
    """
    config = model.config
    architecture = NAMES.get(config.model_type, config.model_type)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\w+_proj)(_bias)?", name):
            values, count, leaf = tensor.float().numpy(), len(EXPERTS[match[2]]), "bias" if match[3] else "weight"
            parts = np.split(values, count, axis=1)
            if architecture == "gpt-oss":
                values = values.swapaxes(1, -1)
                parts = [values[:, part::count] for part in range(count)]
            names = [f"blk.{match[1]}.ffn_{part}_exps.{leaf}" for part in EXPERTS[match[2]]]
            tensors |= {name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}
            continue
        if own := _of_new_families(config, name, tensor.float().numpy()):
            tensors |= own
            continue
        if name.endswith(".sinks"):
            name = f"{name}.weight"
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if name.endswith(".kv_b_proj.weight") and not whole:
            parts = tensor.float().numpy().reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, values = np.split(parts, [config.qk_nope_head_dim], axis=1)
            stem = "blk." + name.split(".")[2]
            tensors[f"{stem}.attn_k_b.weight"] = np.ascontiguousarray(keys.swapaxes(1, 2))
            tensors[f"{stem}.attn_v_b.weight"] = np.ascontiguousarray(values)
            continue
        if config.model_type == "mixtral":
            name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        tensors[found] = _converted(architecture, config, found, tensor.float().numpy())
    tensors |= {name: more.pop(name) for name in [*more] if name.endswith(".weight")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in without}
    kinds = {name: experts for name in tensors if experts is not None and name.endswith("_exps.weight")}
    metadata = {key: value for key, value in (_metadata(architecture, config) | more).items() if value is not None}
    return write_gguf(file, architecture, metadata, tensors, kinds)


def _of_new_families(config: Any, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """What llama.cpp makes of tensors that Llama 4 and Gemma 4 alone have."""
    block = "blk." + name.split(".")[2] if name.startswith("model.layers.") else ""
    if config.model_type == "llama4_text" and name.endswith("experts.gate_up_proj"):
        halves = zip(("gate", "up"), np.split(values.swapaxes(1, 2), 2, axis=1), strict=True)
        return {f"{block}.ffn_{half}_exps.weight": np.ascontiguousarray(part) for half, part in halves}
    if config.model_type == "llama4_text" and name.endswith("experts.down_proj"):
        return {f"{block}.ffn_down_exps.weight": np.ascontiguousarray(values.swapaxes(1, 2))}
    ends = {"layer_scalar": "layer_output_scale.weight", "experts.gate_up_proj": "ffn_gate_up_exps.weight"}
    ends |= {"experts.down_proj": "ffn_down_exps.weight", "router.scale": "ffn_gate_inp.scale"}
    ends |= {"router.per_expert_scale": "ffn_down_exps.scale"}
    found = next((theirs for end, theirs in ends.items() if name.endswith(f".{end}")), None)
    return {f"{block}.{found}": values} if found and config.model_type == "gemma4_text" else {}


def _converted(architecture: str, config: Any, name: str, values: np.ndarray) -> np.ndarray:
    heads = config.num_attention_heads
    if name.endswith(".ffn_gate_inp_shexp.weight"):
        return values[0]
    if architecture in INTERLEAVED and (".attn_q." in name or ".attn_k." in name):
        heads = heads if ".attn_q." in name else config.num_key_value_heads
        halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return values + 1
    if architecture == "gptneox" and ".attn_qkv." in name:
        parts = values.reshape(heads, 3, -1, *values.shape[1:])
        return np.concatenate([parts[:, i].reshape(-1, *values.shape[1:]) for i in range(3)])
    if architecture == "falcon" and ".attn_qkv." in name:
        groups = _falcon_groups(config)
        parts = values.reshape(groups, heads // groups + 2, -1, *values.shape[1:])
        split = parts[:, :-2], parts[:, -2], parts[:, -1]
        return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in split])
    return values


def _falcon_groups(config: Any) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


def _metadata(architecture: str, config: Any) -> dict[str, Any]:
    if architecture == "mpt":
        return {
            "context_length": config.max_seq_len,
            "embedding_length": config.d_model,
            "block_count": config.n_layers,
            "feed_forward_length": 4 * config.d_model,
            "attention.head_count": config.n_heads,
            "attention.layer_norm_epsilon": 1e-5,
            "attention.max_alibi_bias": 8.0,
            "attention.clamp_kqv": config.attn_config.clip_qkv,
        }
    heads, width = config.num_attention_heads, config.hidden_size
    if architecture == "gemma4":
        return _gemma4(config)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": width,
        "block_count": config.num_hidden_layers,
        "attention.head_count": heads,
        "rope.freq_base": float(rope["rope_theta"]),
        "feed_forward_length": getattr(config, "intermediate_size", None) or config.ffn_hidden_size,
    }
    if architecture == "falcon":
        groups = {"attention.head_count_kv": _falcon_groups(config)}
        return found | groups | {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    if architecture == "gptneox":
        rotated = int(width // heads * rope["partial_rotary_factor"])
        own = {"rope.dimension_count": rotated, "use_parallel_residual": config.use_parallel_residual}
        return found | own | {"attention.layer_norm_epsilon": config.layer_norm_eps}
    head_dim = getattr(config, "head_dim", None) or width // heads
    found |= {"attention.head_count_kv": config.num_key_value_heads}
    if architecture == "deepseek2":
        rotated, latent = config.qk_rope_head_dim, config.kv_lora_rank
        found |= {
            "attention.head_count_kv": 1,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "leading_dense_block_count": config.first_k_dense_replace,
            "attention.kv_lora_rank": latent,
            "attention.key_length": latent + rotated,
            "attention.value_length": latent,
            "attention.key_length_mla": config.qk_nope_head_dim + rotated,
            "attention.value_length_mla": config.v_head_dim,
            "rope.dimension_count": rotated,
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.n_shared_experts,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": config.norm_topk_prob,
            "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
            "expert_group_count": config.n_group or 1,
            "expert_group_used_count": config.topk_group or 1,
        }
        return found | ({} if config.q_lora_rank is None else {"attention.q_lora_rank": config.q_lora_rank})
    if architecture == "cohere2":
        own = {"attention.sliding_window": config.sliding_window, "rope.dimension_count": head_dim}
        own |= {"attention.layer_norm_epsilon": config.layer_norm_eps, "logit_scale": config.logit_scale}
        return found | own | {"rope.scaling.type": "none"}
    if architecture == "llama4":
        own = {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim}
        own |= {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "expert_count": config.num_local_experts}
        own |= {"expert_used_count": config.num_experts_per_tok, "feed_forward_length": config.intermediate_size_mlp}
        own |= {"expert_feed_forward_length": config.intermediate_size}
        return found | own | {"interleave_moe_layer_step": config.interleave_moe_layer_step}
    if architecture == "starcoder2":
        return found | {"attention.layer_norm_epsilon": config.norm_epsilon}
    found |= {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.dimension_count": head_dim}
    if architecture in ("qwen3", "qwen3moe", "gemma2", "gemma3", "gpt-oss", "glm4", "mistral3"):
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture == "gpt-oss":
        found["expert_feed_forward_length"] = config.intermediate_size
    if config.model_type in ("mixtral", "gpt_oss"):
        found["expert_count"], found["expert_used_count"] = config.num_local_experts, config.num_experts_per_tok
    if config.model_type in ("qwen2_moe", "qwen3_moe"):
        found["expert_count"], found["expert_used_count"] = config.num_experts, config.num_experts_per_tok
        found["expert_feed_forward_length"] = config.moe_intermediate_size
        if architecture == "qwen2moe":
            found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if architecture == "glm4":
        found["rope.dimension_count"] = int(head_dim * rope["partial_rotary_factor"])
    if architecture == "mistral3":
        found["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
        if rope["rope_type"] == "yarn":
            found |= {f"rope.scaling.yarn_{name}": rope[name] for name in ("beta_fast", "beta_slow")}
            found["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"]
    if architecture == "exaone4" and config.sliding_window:
        found["attention.sliding_window"] = config.sliding_window
        found["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    if config.model_type == "olmo3":
        found["attention.sliding_window"] = config.sliding_window
    if architecture == "granite":
        names = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
        keys = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
        found |= {key: float(getattr(config, name)) for key, name in zip(keys, names, strict=True)}
    if architecture == "phi3":
        found["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    if architecture in ("gemma2", "gemma3", "phi3", "gpt-oss") and config.sliding_window:
        found["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
        found["final_logit_softcapping"] = config.final_logit_softcapping
    return found


def _gemma4(config: Any) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    local, far = (config.per_layer_config[kind] for kind in ("sliding_attention", "full_attention"))
    ropes = config.rope_parameters
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "embedding_length_per_layer_input": 0,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [(local if one else far).num_key_value_heads for one in slides],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": far.head_dim,
        "attention.value_length": far.head_dim,
        "attention.key_length_swa": local.head_dim,
        "attention.value_length_swa": local.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": 0,
        "rope.freq_base": float(ropes["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(ropes["sliding_attention"]["rope_theta"]),
        "rope.dimension_count": far.head_dim,
        "rope.dimension_count_swa": local.head_dim,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    if not config.enable_moe_block:
        return found
    experts = {"expert_count": config.num_experts, "expert_used_count": config.top_k_experts}
    return found | experts | {"expert_feed_forward_length": config.moe_intermediate_size}
