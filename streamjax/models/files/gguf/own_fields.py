"""What the architectures of GGUF files have of their own in a config.json, and what llama.cpp takes for granted.

A function gets the metadata and the fields so far, and returns further fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from streamjax.models.files.gguf.metadata import Metadata

Values = dict[str, Any]  # fields of a config.json
_SOFTMAX, _SIGMOID = 1, 2  # of llama.cpp's functions that score experts
_GROUPS = {160: (8, 3), 256: (8, 4)}  # experts of DeepSeek-V2 and V3: their groups, and those of a token


def llama(metadata: Metadata, values: Values) -> Values:
    """Llama, or Mixtral where there are experts; older files have the width of heads as that of the rotation."""
    head_dim = metadata.get("rope.dimension_count", int)
    more: Values = {"rope_scaling": metadata.scaling(), "mlp_bias": metadata.has("blk.0.ffn_gate.bias")}
    more["attention_bias"] = metadata.has("blk.0.attn_q.bias")
    if values.get("num_local_experts"):
        more = {"model_type": "mixtral", "rope_scaling": metadata.scaling()}
    return more if head_dim is None or "head_dim" in values else more | {"head_dim": head_dim}


def scaled(metadata: Metadata, values: Values) -> Values:
    """A scaled rotation alone."""
    return {"rope_scaling": metadata.scaling()}


def qwen3(metadata: Metadata, values: Values) -> Values:
    """Qwen3: attention may have biases."""
    return {"rope_scaling": metadata.scaling(), "attention_bias": metadata.has("blk.0.attn_q.bias")}


def qwen_moe(normalize: bool) -> Callable[[Metadata, Values], Values]:
    """What llama.cpp takes for granted: whether a token's weights of experts sum to 1, and experts in all layers."""

    def more(metadata: Metadata, values: Values) -> Values:
        return {"rope_scaling": metadata.scaling(), "norm_topk_prob": normalize}

    return more


def biased(metadata: Metadata, values: Values) -> Values:
    """Biases, which a file has as tensors."""
    biases = {"attention_bias": metadata.has("blk.0.attn_q.bias"), "mlp_bias": metadata.has("blk.0.ffn_gate.bias")}
    return {"rope_scaling": metadata.scaling()} | biases


def olmo2(metadata: Metadata, values: Values) -> Values:
    """OLMo 2, or OLMo 3 where layers slide."""
    window = metadata.get("attention.sliding_window", int)
    metadata.seen.add("attention.sliding_window_pattern")
    found: Values = {"rope_scaling": metadata.scaling()}
    return found | {"model_type": "olmo3", "sliding_window": window} if window else found


def gemma(large: int) -> Callable[[Metadata, Values], Values]:
    """What Gemma 2 and 3 have; the model of so many layers, the largest, scales queries by another width."""

    def more(metadata: Metadata, values: Values) -> Values:
        width = values.get("head_dim", 256)
        if values.get("num_hidden_layers") == large:
            width = values["hidden_size"] // values["num_attention_heads"]
        found: Values = {"query_pre_attn_scalar": width, "rope_scaling": metadata.scaling()}
        local = metadata.get("rope.freq_base_swa", float)
        found |= metadata.layer_types(values)
        return found if local is None else found | {"rope_local_base_freq": local}

    return more


def _rotated(metadata: Metadata, values: Values) -> float:
    """The part of a head that rotates, so that its product with the width rounds down to what the file has."""
    width = values.get("head_dim") or values.get("hidden_size", 0) // max(1, values.get("num_attention_heads", 1))
    rotated = metadata.get("rope.dimension_count", int, width)
    return 1.0 if rotated == width or not width else (rotated + 0.5) / width


def phi3(metadata: Metadata, values: Values) -> Values:
    """Phi-3: a part of a head may rotate, and LongRoPE has a length of its own."""
    original = metadata.get("rope.scaling.original_context_length", int)
    fraction, window = _rotated(metadata, values), metadata.get("attention.sliding_window", int)
    found = {"partial_rotary_factor": fraction, "rope_scaling": metadata.scaling(), "sliding_window": window or None}
    return found if original is None else found | {"original_max_position_embeddings": original}


def falcon(metadata: Metadata, values: Values) -> Values:
    """Falcon: its variants differ in their norms and in how many heads share keys."""
    kv_heads = metadata.get("attention.head_count_kv", int, values["num_attention_heads"])
    two_norms = metadata.has("blk.0.attn_norm_2.weight")
    new = two_norms or kv_heads not in (1, values["num_attention_heads"])
    return {
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if new else None,
        "bias": metadata.has("blk.0.attn_qkv.bias"),
        "rope_scaling": metadata.scaling(),
    }


def gpt_neox(metadata: Metadata, values: Values) -> Values:
    """GPT-NeoX: a part of a head may rotate."""
    return {
        "rotary_pct": _rotated(metadata, values),
        "attention_bias": metadata.has("blk.0.attn_qkv.bias"),
        "rope_scaling": metadata.scaling(),
    }


def glm4(metadata: Metadata, values: Values) -> Values:
    """GLM-4: a part of a head rotates; the model with images has its queries and keys in another order."""
    if metadata.header.values.get("glm4.rope.dimension_sections") is not None:
        where = f"{metadata.header.file}: 'glm4.rope.dimension_sections'"
        raise ValueError(f"{where}: a GLM-4V, whose positions have several axes; streamjax reads GLM-4 without images")
    biased = {"attention_bias": metadata.has("blk.0.attn_q.bias")}
    return {"rope_scaling": metadata.scaling(), "partial_rotary_factor": _rotated(metadata, values)} | biased


def windows(metadata: Metadata, values: Values) -> Values:
    """Cohere2 and EXAONE 4: where a file does not say which layers slide, they are all but every fourth."""
    window = metadata.get("attention.sliding_window", int) or None
    found: Values = {"rope_scaling": metadata.scaling(), "sliding_window": window} | metadata.layer_types(values)
    return found if window else found | {"layer_types": ["full_attention"] * values.get("num_hidden_layers", 0)}


def mistral3(metadata: Metadata, values: Values) -> Values:
    """Queries may grow with their position; a file has YaRN's `mscale_all_dim` alone."""
    scaling = metadata.scaling() or {"rope_type": "default"}
    scaling["llama_4_scaling_beta"] = metadata.get("attention.temperature_scale", float, 0.0)
    original = metadata.get("rope.scaling.original_context_length", int)
    all_dim = metadata.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    if original:
        scaling["original_max_position_embeddings"] = original
    if scaling["rope_type"] == "yarn" and all_dim:
        scaling |= {"mscale": 1.0, "mscale_all_dim": all_dim}
    return {"rope_parameters": scaling, "sliding_window": None}


def deepseek2(metadata: Metadata, values: Values) -> Values:
    """DeepSeek-V2 where experts are scored by a softmax, and V3 where by a sigmoid.

    Newer files have widths of keys and values that are those of the latent, and the widths of heads elsewhere.
    """
    gating, rotated = metadata.get("expert_gating_func", int, _SOFTMAX), metadata.get("rope.dimension_count", int, 64)
    if gating not in (_SOFTMAX, _SIGMOID):
        raise ValueError(f"{metadata.header.file}: 'deepseek2.expert_gating_func' is {gating}, not known")
    keys, width = (metadata.get(f"attention.{part}_length", int) for part in ("key", "value"))
    keys = metadata.get("attention.key_length_mla", int, keys)
    scaling, log = metadata.scaling(), metadata.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    if scaling and log:
        scaling["mscale"] = scaling["mscale_all_dim"] = round(10 * log, 6)
    found: Values = {
        "model_type": "deepseek_v3" if gating == _SIGMOID else "deepseek_v2",
        "q_lora_rank": metadata.get("attention.q_lora_rank", int),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": 128 if keys is None else keys - rotated,
        "v_head_dim": metadata.get("attention.value_length_mla", int, width),
        "norm_topk_prob": metadata.get("expert_weights_norm", bool, False),
        "rope_scaling": scaling,
    }
    if "n_group" not in values:  # in older files
        found["n_group"], found["topk_group"] = _GROUPS.get(values.get("n_routed_experts", 0), (1, 1))
    if gating == _SOFTMAX:
        found["topk_method"] = "group_limited_greedy" if (values | found)["n_group"] > 1 else "greedy"
    return {name: value for name, value in found.items() if value is not None or name == "q_lora_rank"}


def llama4(metadata: Metadata, values: Values) -> Values:
    """Llama 4: llama.cpp has chunks, layers without positions and temperatures as the published models have them, which
    are the architecture's defaults, and no norm over heads in the model of 128 experts."""
    window = metadata.get("attention.sliding_window", int)
    if window not in (None, 0, 8192):
        raise ValueError(f"{metadata.header.file}: 'llama4.attention.sliding_window' is {window}; expected 8192 or 0")
    found = {"rope_scaling": metadata.scaling(), "use_qk_norm": values.get("num_local_experts") != 128}
    found["attention_bias"] = metadata.has("blk.0.attn_q.bias")
    layers = values.get("num_hidden_layers", 0)
    # A window of 0 stands for a model without chunks, whose layers all rotate.
    return found | ({"attention_chunk_size": None, "no_rope_layers": [1] * layers} if window == 0 else {})


def gemma4(metadata: Metadata, values: Values) -> Values:
    """Gemma 4: heads of two kinds, of which the file has one list; keys are values where a layer has no values."""
    layers, theta = values.get("num_hidden_layers", 0), metadata.get("rope.freq_base", float, 1e6)
    if values.get("hidden_size_per_layer_input"):
        raise ValueError(f"{metadata.header.file}: E2B and E4B are not read from GGUF: take the folder of the model")
    types: Values = metadata.layer_types(values)
    full = [i for i, kind in enumerate(types.get("layer_types", ())) if kind == "full_attention"]
    metadata.seen.update(("attention.head_count_kv", "attention.value_length_swa", "rope.dimension_count_swa"))
    heads = metadata.header.values.get("gemma4.attention.head_count_kv")
    counts = np.broadcast_to(np.asarray(heads if heads is not None else values["num_attention_heads"]), layers)
    if counts.dtype.kind not in "iu" or not full or len(full) == layers:
        raise ValueError(f"{metadata.header.file}: no Gemma 4 with a number of heads and a kind for each of its layers")
    local = next(int(count) for i, count in enumerate(counts) if i not in full)
    sizes = {"head_dim": values.get("global_head_dim", 512), "num_key_value_heads": int(counts[full[0]])}
    turning: Values = {"rope_type": "proportional", "rope_theta": theta}
    if metadata.has("rope_freqs.weight"):  # 1 where a pair turns, very large where it does not
        factors = metadata.numbers("rope_freqs.weight")
        turning["partial_rotary_factor"] = sum(factor < 1e20 for factor in factors) / len(factors)
    return types | {
        "num_key_value_heads": local,
        "per_layer_config": {str(layer): sizes for layer in full},
        "attention_k_eq_v": not metadata.has(f"blk.{full[0]}.attn_v.weight"),
        "attention_bias": metadata.has("blk.0.attn_q.bias"),
        "hidden_size_per_layer_input": values.get("hidden_size_per_layer_input", 0),
        "enable_moe_block": bool(values.get("num_experts")),
        "rope_parameters": {
            "full_attention": turning,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.get("rope.freq_base_swa", float, 10_000.0),
            },
        },
    }


def starcoder2(metadata: Metadata, values: Values) -> Values:
    """StarCoder2: biases everywhere, or nowhere; a file does not have its window."""
    return {"rope_scaling": metadata.scaling(), "use_bias": metadata.has("blk.0.attn_q.bias")}


def gpt_oss(metadata: Metadata, values: Values) -> Values:
    """gpt-oss rounds no bounds of YaRN, of which a file says nothing."""
    scaling = metadata.scaling() or {"rope_type": "default"}
    if scaling["rope_type"] == "yarn":
        scaling["truncate"] = False
    return {"rope_scaling": scaling, "attention_bias": metadata.has("blk.0.attn_q.bias")} | metadata.layer_types(values)


def mpt(metadata: Metadata, values: Values) -> Values:
    """MPT: ALiBi, and values of the projections that are clipped."""
    bias, clip = metadata.get("attention.max_alibi_bias", float, 8.0), metadata.get("attention.clamp_kqv", float)
    metadata.seen.add("feed_forward_length")  # four times the model's width
    return {"attn_config": {"alibi": bias > 0, "alibi_bias_max": bias, "clip_qkv": clip}}
