"""The architectures of GGUF files: what each is called by Hugging Face, and what llama.cpp did to its tensors.

The names of tensors come from the gguf package's own table, read backwards. `ARCHITECTURES` has one entry for each
architecture: adding one takes an entry, and a function for what its config alone has.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from streamjax.models.files.gguf import metadata as md
from streamjax.models.files.gguf.metadata import Keys, Metadata
from streamjax.models.files.gguf.weights import DequantisedTensor, KeyValueTensor, TurnedTensor
from streamjax.models.files.safetensors_files import AnyTensor

Values = dict[str, Any]  # fields of a config.json
Rows = Callable[[Values, str, int], np.ndarray]  # fields, name in the file, rows -> for each row its row in the file


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF files.

    Attributes:
      model_type: of Hugging Face's config.json; `more` may say another.
      keys: metadata that are fields there.
      more: further fields, from the metadata and the fields so far.
      rows: regular expressions of tensors whose rows llama.cpp has put in another order, and how to get them back.
      shift: names of tensors to which a number was added, and what brings them back.
      parts: ends of Hugging Face's names of tensors that llama.cpp has split or renamed, and the ends under which its
        table knows the parts.
      join: what makes such a tensor of its parts.
    """

    model_type: str
    keys: Keys
    more: Callable[[Metadata, Values], Values] = lambda metadata, values: {}
    rows: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
    shift: tuple[str, float] | None = None
    parts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    join: Callable[..., AnyTensor] = lambda *parts: TurnedTensor(parts)

    def order(self, values: Values, name: str, count: int) -> np.ndarray | None:
        """For each of `count` rows of a tensor its row in the file; None where they are the same."""
        found = next((rows for pattern, rows in self.rows.items() if re.search(pattern, name)), None)
        return None if found is None else found(values, name, count)

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The names of the parts of a tensor of Hugging Face; none where it is whole."""
        found = ((name.removesuffix(end), parts) for end, parts in self.parts.items() if name.endswith(f".{end}"))
        stem, parts = next(found, ("", ()))
        return tuple(stem + part for part in parts)

    def shifted(self, name: str) -> float:
        """What is added to the values in the file."""
        return self.shift[1] if self.shift and re.search(self.shift[0], name) else 0.0


def interleaved(values: Values, name: str, count: int) -> np.ndarray:
    """Llama's queries and keys: llama.cpp has the two halves of a head, which rotate together, in turns."""
    heads = values["num_key_value_heads" if ".attn_k." in name else "num_attention_heads"]
    if count % (2 * heads):
        raise ValueError(f"tensor {name!r} has {count} rows, which are no pairs in {heads} heads")
    order = np.arange(count).reshape(heads, count // heads // 2, 2)
    return np.ascontiguousarray(order.swapaxes(1, 2)).reshape(-1)


def grouped(values: Values, name: str, count: int) -> np.ndarray:
    """Fused queries, keys and values: llama.cpp has all queries first; Hugging Face goes by groups that share keys."""
    heads = values["num_attention_heads"]
    groups: int = values.get("num_kv_heads") or heads
    width, rest = divmod(count, heads + 2 * groups)
    if rest or heads % groups:
        raise ValueError(f"tensor {name!r} has {count} rows, for {heads} heads in {groups} groups")
    order = np.arange(count).reshape(heads + 2 * groups, width)
    queries, keys, values_ = np.split(order, [heads, heads + groups])
    parts = (part.reshape(groups, -1, width) for part in (queries, keys, values_))
    return np.concatenate(list(parts), axis=1).reshape(-1)


def _llama(metadata: Metadata, values: Values) -> Values:
    head_dim = metadata.get("rope.dimension_count", int)
    more: Values = {"rope_scaling": metadata.scaling(), "mlp_bias": metadata.has("blk.0.ffn_gate.bias")}
    more["attention_bias"] = metadata.has("blk.0.attn_q.bias")
    if values.get("num_local_experts"):
        more = {"model_type": "mixtral", "rope_scaling": metadata.scaling()}
    return more if head_dim is None or "head_dim" in values else more | {"head_dim": head_dim}


def _scaled(metadata: Metadata, values: Values) -> Values:
    return {"rope_scaling": metadata.scaling()}


def _qwen3(metadata: Metadata, values: Values) -> Values:
    return {"rope_scaling": metadata.scaling(), "attention_bias": metadata.has("blk.0.attn_q.bias")}


def _qwen_moe(normalize: bool) -> Callable[[Metadata, Values], Values]:
    """What llama.cpp takes for granted: whether a token's weights of experts sum to 1, and experts in all layers."""

    def more(metadata: Metadata, values: Values) -> Values:
        return {"rope_scaling": metadata.scaling(), "norm_topk_prob": normalize}

    return more


def _biased(metadata: Metadata, values: Values) -> Values:
    biases = {"attention_bias": metadata.has("blk.0.attn_q.bias"), "mlp_bias": metadata.has("blk.0.ffn_gate.bias")}
    return {"rope_scaling": metadata.scaling()} | biases


def _olmo2(metadata: Metadata, values: Values) -> Values:
    """OLMo 2, or OLMo 3 where layers slide."""
    window = metadata.get("attention.sliding_window", int)
    metadata.seen.add("attention.sliding_window_pattern")
    found: Values = {"rope_scaling": metadata.scaling()}
    return found | {"model_type": "olmo3", "sliding_window": window} if window else found


def _gemma(large: int) -> Callable[[Metadata, Values], Values]:
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


def _phi3(metadata: Metadata, values: Values) -> Values:
    original = metadata.get("rope.scaling.original_context_length", int)
    fraction, window = _rotated(metadata, values), metadata.get("attention.sliding_window", int)
    found = {"partial_rotary_factor": fraction, "rope_scaling": metadata.scaling(), "sliding_window": window or None}
    return found if original is None else found | {"original_max_position_embeddings": original}


def _falcon(metadata: Metadata, values: Values) -> Values:
    kv_heads = values["num_key_value_heads"]
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


def _gpt_neox(metadata: Metadata, values: Values) -> Values:
    return {
        "rotary_pct": _rotated(metadata, values),
        "attention_bias": metadata.has("blk.0.attn_qkv.bias"),
        "rope_scaling": metadata.scaling(),
    }


def _glm4(metadata: Metadata, values: Values) -> Values:
    if metadata.header.values.get("glm4.rope.dimension_sections") is not None:
        where = f"{metadata.header.file}: 'glm4.rope.dimension_sections'"
        raise ValueError(f"{where}: a GLM-4V, whose positions have several axes; streamjax reads GLM-4 without images")
    biased = {"attention_bias": metadata.has("blk.0.attn_q.bias")}
    return {"rope_scaling": metadata.scaling(), "partial_rotary_factor": _rotated(metadata, values)} | biased


def _windows(metadata: Metadata, values: Values) -> Values:
    """Cohere2 and EXAONE 4: where a file does not say which layers slide, they are all but every fourth."""
    window = metadata.get("attention.sliding_window", int) or None
    found: Values = {"rope_scaling": metadata.scaling(), "sliding_window": window} | metadata.layer_types(values)
    return found if window else found | {"layer_types": ["full_attention"] * values.get("num_hidden_layers", 0)}


def _mistral3(metadata: Metadata, values: Values) -> Values:
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


def _deepseek2(metadata: Metadata, values: Values) -> Values:
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
    if gating == _SOFTMAX:
        found["topk_method"] = "group_limited_greedy" if values.get("n_group", 1) > 1 else "greedy"
    return {name: value for name, value in found.items() if value is not None or name == "q_lora_rank"}


def _join_deepseek2(*parts: DequantisedTensor) -> AnyTensor:
    return KeyValueTensor(*parts) if len(parts) == 2 else TurnedTensor(parts)


def _starcoder2(metadata: Metadata, values: Values) -> Values:
    return {"rope_scaling": metadata.scaling(), "use_bias": metadata.has("blk.0.attn_q.bias")}


def _gpt_oss(metadata: Metadata, values: Values) -> Values:
    """gpt-oss rounds no bounds of YaRN, of which a file says nothing."""
    scaling = metadata.scaling() or {"rope_type": "default"}
    if scaling["rope_type"] == "yarn":
        scaling["truncate"] = False
    return {"rope_scaling": scaling, "attention_bias": metadata.has("blk.0.attn_q.bias")} | metadata.layer_types(values)


def _mpt(metadata: Metadata, values: Values) -> Values:
    bias, clip = metadata.get("attention.max_alibi_bias", float, 8.0), metadata.get("attention.clamp_kqv", float)
    return {"attn_config": {"alibi": bias > 0, "alibi_bias_max": bias, "clip_qkv": clip}}


_LLAMA_ROWS = {r"\.attn_[qk]\.": interleaved}
_FUSED_ROWS = {r"\.attn_qkv\.": grouped}
_NORMS = r"norm\.weight$"
_DECODER = md.SIZES | md.RMS | md.ROPE
_LAYER_NORM: Keys = {"attention.layer_norm_epsilon": ("layer_norm_epsilon", md.NUMBER)}

_SOFTMAX, _SIGMOID = 1, 2  # of llama.cpp's functions that score experts
_DEEPSEEK: Keys = {
    "leading_dense_block_count": ("first_k_dense_replace", md.WHOLE),
    "attention.kv_lora_rank": ("kv_lora_rank", md.WHOLE),
    "expert_count": ("n_routed_experts", md.WHOLE),
    "expert_used_count": ("num_experts_per_tok", md.WHOLE),
    "expert_feed_forward_length": ("moe_intermediate_size", md.WHOLE),
    "expert_shared_count": ("n_shared_experts", md.WHOLE),
    "expert_weights_scale": ("routed_scaling_factor", md.NUMBER),
    "expert_group_count": ("n_group", md.WHOLE),
    "expert_group_used_count": ("topk_group", md.WHOLE),
}
_DEEPSEEK_PARTS = {
    "kv_b_proj.weight": ("k_b_proj.weight", "v_b_proj.weight"),
    "e_score_correction_bias": ("e_score_correction.bias",),
}
_GPT_OSS_PARTS = {
    "sinks": ("sinks.weight",),
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "gate_up_proj_bias": ("gate_proj.bias", "up_proj.bias"),
    "down_proj": ("down_proj.weight",),
    "down_proj_bias": ("down_proj.bias",),
}
_GPT_OSS: Keys = {"expert_feed_forward_length": ("intermediate_size", md.WHOLE)}
_QWEN_EXPERTS: Keys = {
    "expert_count": ("num_experts", md.WHOLE),
    "expert_used_count": ("num_experts_per_tok", md.WHOLE),
    "expert_feed_forward_length": ("moe_intermediate_size", md.WHOLE),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", md.WHOLE),
}
_FACTORS: Keys = {
    "attention.scale": ("attention_multiplier", md.NUMBER),
    "embedding_scale": ("embedding_multiplier", md.NUMBER),
    "residual_scale": ("residual_multiplier", md.NUMBER),
    "logit_scale": ("logits_scaling", md.NUMBER),
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _DECODER | md.HEAD | md.EXPERTS, _llama, _LLAMA_ROWS),
    "qwen2": Architecture("qwen2", _DECODER, _scaled),
    "qwen3": Architecture("qwen3", _DECODER | md.HEAD, _qwen3),
    "qwen2moe": Architecture("qwen2_moe", _DECODER | _QWEN_EXPERTS, _qwen_moe(False)),
    "qwen3moe": Architecture("qwen3_moe", _DECODER | md.HEAD | _QWEN_EXPERTS, _qwen_moe(True)),
    "smollm3": Architecture("smollm3", _DECODER, _biased, _LLAMA_ROWS),
    "olmo2": Architecture("olmo2", _DECODER, _olmo2),
    "granite": Architecture("granite", _DECODER | _FACTORS, _biased, _LLAMA_ROWS),
    "phi3": Architecture("phi3", _DECODER, _phi3),
    "gemma2": Architecture("gemma2", _DECODER | md.HEAD | md.WINDOW | md.CAPS, _gemma(46), shift=(_NORMS, -1.0)),
    "gemma3": Architecture("gemma3_text", _DECODER | md.HEAD | md.WINDOW | md.CAPS, _gemma(62), shift=(_NORMS, -1.0)),
    "falcon": Architecture(
        "falcon",
        md.SIZES | md.ROPE | _LAYER_NORM | {"feed_forward_length": ("ffn_hidden_size", md.WHOLE)},
        _falcon,
        _FUSED_ROWS,
    ),
    "gptneox": Architecture(
        "gpt_neox",
        md.SIZES
        | {
            "attention.layer_norm_epsilon": ("layer_norm_eps", md.NUMBER),
            "use_parallel_residual": ("use_parallel_residual", md.FLAG),
            "rope.freq_base": ("rotary_emb_base", md.NUMBER),
        },
        _gpt_neox,
        _FUSED_ROWS,
    ),
    "cohere2": Architecture(
        "cohere2",
        md.SIZES
        | md.ROPE
        | md.HEAD
        | {
            "attention.layer_norm_epsilon": ("layer_norm_eps", md.NUMBER),
            "logit_scale": ("logit_scale", md.NUMBER),
        },
        _windows,
    ),
    "glm4": Architecture("glm4", _DECODER | md.HEAD, _glm4),
    "exaone4": Architecture("exaone4", _DECODER | md.HEAD, _windows),
    "mistral3": Architecture("ministral3", _DECODER | md.HEAD, _mistral3, _LLAMA_ROWS),
    "deepseek2": Architecture(
        "deepseek_v2", _DECODER | _DEEPSEEK, _deepseek2, parts=_DEEPSEEK_PARTS, join=_join_deepseek2
    ),
    "starcoder2": Architecture(
        "starcoder2",
        md.SIZES | md.ROPE | {"attention.layer_norm_epsilon": ("norm_epsilon", md.NUMBER)},
        _starcoder2,
    ),
    "gpt-oss": Architecture(
        "gpt_oss", _DECODER | md.HEAD | md.WINDOW | md.EXPERTS | _GPT_OSS, _gpt_oss, parts=_GPT_OSS_PARTS
    ),
    "mpt": Architecture(
        "mpt",
        {
            "context_length": ("max_seq_len", md.WHOLE),
            "embedding_length": ("d_model", md.WHOLE),
            "block_count": ("n_layers", md.WHOLE),
            "attention.head_count": ("n_heads", md.WHOLE),
            "attention.layer_norm_epsilon": ("layer_norm_epsilon", md.NUMBER),
        },
        _mpt,
    ),
}
