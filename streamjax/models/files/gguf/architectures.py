"""The architectures of GGUF files: what each is called by Hugging Face, and what llama.cpp did to its tensors.

The names of tensors come from the gguf package's own table, read backwards. `ARCHITECTURES` has one entry for each
architecture: adding one takes an entry, and a function in `own_fields` for what its config alone has.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from streamjax.models.files.gguf import metadata as md
from streamjax.models.files.gguf import own_fields as own
from streamjax.models.files.gguf.metadata import Keys, Metadata
from streamjax.models.files.gguf.own_fields import Values
from streamjax.models.files.gguf.weights import DequantisedTensor, KeyValueTensor, TurnedTensor
from streamjax.models.files.safetensors_files import AnyTensor

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


def _join_deepseek2(*parts: DequantisedTensor) -> AnyTensor:
    return KeyValueTensor(*parts) if len(parts) == 2 else TurnedTensor(parts)


_LLAMA_ROWS = {r"\.attn_[qk]\.": interleaved}
_FUSED_ROWS = {r"\.attn_qkv\.": grouped}
_NORMS = r"norm\.weight$"
_DECODER = md.SIZES | md.GROUPS | md.RMS | md.ROPE
_LAYER_NORM: Keys = {"attention.layer_norm_epsilon": ("layer_norm_epsilon", md.NUMBER)}

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
_LLAMA4_PARTS = {
    "experts.gate_up_proj": ("experts.gate_proj.weight", "experts.up_proj.weight"),
    "experts.down_proj": ("experts.down_proj.weight",),
}
_LLAMA4: Keys = {
    "feed_forward_length": ("intermediate_size_mlp", md.WHOLE),
    "expert_feed_forward_length": ("intermediate_size", md.WHOLE),
    "interleave_moe_layer_step": ("interleave_moe_layer_step", md.WHOLE),
}
_GEMMA4_PARTS = {
    "layer_scalar": ("layer_scalar.weight",),
    "experts.gate_up_proj": ("experts.gate_up_proj.weight",),
    "experts.down_proj": ("experts.down_proj.weight",),
    "router.scale": ("router.proj.scale",),
    "router.per_expert_scale": ("experts.down_proj.scale",),
}
_GEMMA4: Keys = {
    "attention.key_length_swa": ("head_dim", md.WHOLE),
    "attention.key_length": ("global_head_dim", md.WHOLE),
    "final_logit_softcapping": ("final_logit_softcapping", md.NUMBER),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input", md.WHOLE),
    "attention.shared_kv_layers": ("num_kv_shared_layers", md.WHOLE),
    "expert_count": ("num_experts", md.WHOLE),
    "expert_used_count": ("top_k_experts", md.WHOLE),
    "expert_feed_forward_length": ("moe_intermediate_size", md.WHOLE),
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
    "llama": Architecture("llama", _DECODER | md.HEAD | md.EXPERTS, own.llama, _LLAMA_ROWS),
    "qwen2": Architecture("qwen2", _DECODER, own.scaled),
    "qwen3": Architecture("qwen3", _DECODER | md.HEAD, own.qwen3),
    "qwen2moe": Architecture("qwen2_moe", _DECODER | _QWEN_EXPERTS, own.qwen_moe(False)),
    "qwen3moe": Architecture("qwen3_moe", _DECODER | md.HEAD | _QWEN_EXPERTS, own.qwen_moe(True)),
    "smollm3": Architecture("smollm3", _DECODER, own.biased, _LLAMA_ROWS),
    "olmo2": Architecture("olmo2", _DECODER, own.olmo2),
    "granite": Architecture("granite", _DECODER | _FACTORS, own.biased, _LLAMA_ROWS),
    "phi3": Architecture("phi3", _DECODER, own.phi3),
    "gemma2": Architecture("gemma2", _DECODER | md.HEAD | md.WINDOW | md.CAPS, own.gemma(46), shift=(_NORMS, -1.0)),
    "gemma3": Architecture(
        "gemma3_text", _DECODER | md.HEAD | md.WINDOW | md.CAPS, own.gemma(62), shift=(_NORMS, -1.0)
    ),
    "falcon": Architecture(
        "falcon",
        md.SIZES | md.ROPE | _LAYER_NORM | {"feed_forward_length": ("ffn_hidden_size", md.WHOLE)},
        own.falcon,
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
        own.gpt_neox,
        _FUSED_ROWS,
    ),
    "cohere2": Architecture(
        "cohere2",
        md.SIZES
        | md.GROUPS
        | md.ROPE
        | md.HEAD
        | {
            "attention.layer_norm_epsilon": ("layer_norm_eps", md.NUMBER),
            "logit_scale": ("logit_scale", md.NUMBER),
        },
        own.windows,
    ),
    "glm4": Architecture("glm4", _DECODER | md.HEAD, own.glm4),
    "exaone4": Architecture("exaone4", _DECODER | md.HEAD, own.windows),
    "mistral3": Architecture("ministral3", _DECODER | md.HEAD, own.mistral3, _LLAMA_ROWS),
    "llama4": Architecture(
        "llama4_text",
        _DECODER | md.HEAD | md.EXPERTS | _LLAMA4,
        own.llama4,
        parts=_LLAMA4_PARTS,
        join=lambda *parts: TurnedTensor(parts, turns=False),
    ),
    "gemma4": Architecture(
        "gemma4_text",
        md.SIZES | md.RMS | md.WINDOW | _GEMMA4,
        own.gemma4,
        parts=_GEMMA4_PARTS,
        join=lambda *parts: parts[0],
    ),
    "deepseek2": Architecture(
        "deepseek_v2", _DECODER | _DEEPSEEK, own.deepseek2, parts=_DEEPSEEK_PARTS, join=_join_deepseek2
    ),
    "starcoder2": Architecture(
        "starcoder2",
        md.SIZES | md.GROUPS | md.ROPE | {"attention.layer_norm_epsilon": ("norm_epsilon", md.NUMBER)},
        own.starcoder2,
    ),
    "gpt-oss": Architecture(
        "gpt_oss", _DECODER | md.HEAD | md.WINDOW | md.EXPERTS | _GPT_OSS, own.gpt_oss, parts=_GPT_OSS_PARTS
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
        own.mpt,
    ),
}
