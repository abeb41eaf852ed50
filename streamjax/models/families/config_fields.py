"""Reading a Hugging Face `config.json`: typed fields, none of them ignored by accident.

`Fields` remembers which fields a family has looked at. What is left over must be harmless (`HARMLESS`: fields that do
not change what a decoder computes at inference); anything else is reported, so that a field nobody thought of is seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}

_HARMLESS = """
bookkeeping:
  _name_or_path _commit_hash architectures auto_map dtype id2label label2id model_type problem_type torch_dtype
  transformers_version unsloth_version unsloth_fixed init_device task_specific_params tokenizer_class
  _model_name_or_path _from_model_config _post_init_done base_model_name_or_path is_llama_config transformers.js_config
  unk_token_id mask_token_id cls_token_id model_max_length tokenizer_model_max_length max_sequence_length seq_length
  for_llm_compressor
what a forward pass returns or keeps, and how it is computed:
  _attn_implementation _attn_implementation_autoset attn_implementation chunk_size_feed_forward output_attentions
  output_hidden_states output_scores return_dict return_dict_in_generate use_cache use_return_dict cache_implementation
  _attn_implementation_internal _experts_implementation_internal _output_attentions use_flash_attn use_flash_attention_2
  pretraining_tp gradient_checkpointing torchscript use_bfloat16 tf_legacy_loss
training, dropout and the initial weights:
  aux_loss_alpha seq_aux ep_size num_nextn_predict_layers num_mtp_layers
  attention_dropout attn_pdrop classifier_dropout emb_pdrop embd_pdrop hidden_dropout hidden_dropout_prob
  attention_probs_dropout_prob resid_pdrop summary_first_dropout initializer_range init_config
  residual_dropout embedding_dropout output_router_logits router_aux_loss_coef router_jitter_noise
generation:
  bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
  exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id length_penalty max_length
  min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences prefix remove_invalid_values
  repetition_penalty sep_token_id suppress_tokens temperature top_k top_p typical_p decoder_start_token_id pad_token_id
  bos_token_id eos_token_id
  epsilon_cutoff eta_cutoff force_words_ids guidance_scale max_new_tokens min_new_tokens min_p penalty_alpha
  renormalize_logits stop_strings
"""
HARMLESS = frozenset(name for line in _HARMLESS.splitlines() if not line.endswith(":") for name in line.split())
MISSING: Any = object()
_LARGEST = 1e30  # of a number; NaN and infinity, which Python's JSON has, are none


class Fields:
    """The fields of one `config.json`, with the ones that were read.

    A `null` in the file reads as None where a family allows it; a value of the wrong type is a ValueError, and so are
    NaN and infinity.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)
        self.defaults: Mapping[str, Any] = {}  # of the architecture, for fields that a family calls without one
        self.seen: set[str] = set()
        self.sections: dict[str, Fields] = {}

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = MISSING) -> Any:
        """The value of a field, None where it is null.

        Raises:
          ValueError: it is absent and there is no default, or it is of another type or not finite.
        """
        self.seen.add(name)
        value = self.values.get(name, self.defaults.get(name, MISSING) if default is MISSING else default)
        if value is MISSING:
            raise ValueError(f"field {name!r} is missing")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if isinstance(value, bool) and bool not in kinds:
            kinds = ()
        if value is not None and not isinstance(value, kinds):
            names = " or ".join(k.__name__ for k in kinds) or "a number"
            raise ValueError(f"field {name!r} is {value!r}; expected {names}")
        if isinstance(value, int | float) and not abs(value) < _LARGEST:
            raise ValueError(f"field {name!r} is {value}; expected a finite number")
        return value

    def integer(self, name: str, default: Any = MISSING, least: int = 1) -> int:
        """A whole number of at least `least`; null reads as the default."""
        value = self.get(name, int, default)
        if value is None:
            value = default
        if value is MISSING or value is None:
            raise ValueError(f"field {name!r} is null; expected int")
        if not least <= value < 2**31:
            raise ValueError(f"field {name!r} is {value}; expected {least} to 2**31 - 1")
        return value

    def number(self, name: str, default: Any = MISSING) -> float:
        """A number; null reads as the default."""
        value = self.get(name, (int, float), default)
        if value is None:
            value = default
        if value is MISSING or value is None:
            raise ValueError(f"field {name!r} is null; expected float")
        return float(value)

    def positive(self, name: str, default: Any) -> float:
        """A number above zero; null reads as the default."""
        value = self.number(name, default)
        if value <= 0:
            raise ValueError(f"field {name!r} is {value}; it must be positive")
        return value

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """A whole number of at least 1, or None where the field is null."""
        return None if self.get(name, int, default) is None else self.integer(name, default)

    def optional_positive(self, name: str, default: float | None = None) -> float | None:
        """A number above zero, or None where the field is null."""
        return None if self.get(name, (int, float), default) is None else self.positive(name, default)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean; null reads as False."""
        return bool(self.get(name, bool, default))

    def activation(self, name: str, default: str) -> Any:
        """The activation function that a field names, by its name in `ModelConfig`."""
        value = self.get(name, str, default) or default
        if value not in ACTIVATIONS:
            raise ValueError(f"field {name!r} is {value!r}; streamjax has {', '.join(sorted(ACTIVATIONS))}")
        return ACTIVATIONS[value]

    def only(self, name: str, allowed: Collection[Any], default: Any = None) -> None:
        """Refuse a field whose value asks for something that the library does not compute."""
        self.seen.add(name)
        value = self.values.get(name, default)
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in allowed):
            shown = " or ".join(repr(v) for v in allowed)
            raise ValueError(f"field {name!r} is {value!r}, which streamjax does not implement; it must be {shown}")

    def section(self, name: str) -> Fields:
        """The fields of a nested object; empty where it is absent."""
        if name not in self.sections:
            self.sections[name] = Fields(self.get(name, dict, {}) or {})
        return self.sections[name]

    def unread(self) -> list[str]:
        """Fields that nobody read, that are not known to be harmless and that hold something."""
        own = [
            name
            for name, value in self.values.items()
            if name not in self.seen and name not in HARMLESS and value not in (None, False, "", [], {})
        ]
        nested = [f"{section}.{name}" for section, fields in self.sections.items() for name in fields.unread()]
        return sorted(own + nested)


def by_layer(types: Sequence[Any], known: Mapping[str, bool], num_layers: int, who: str = "streamjax") -> list[bool]:
    """What `known` says of each entry of the field `layer_types`; `who` knows no others, as an error says.

    Raises:
      ValueError: an entry that is not known, or not one for each layer.
    """
    unknown = [kind for kind in types if not isinstance(kind, str) or kind not in known]
    if unknown:
        raise ValueError(f"field 'layer_types' has {unknown[0]!r}; {who} has {', '.join(known)}")
    if len(types) != num_layers:
        raise ValueError(f"field 'layer_types' has {len(types)} entries for {num_layers} layers")
    return [known[kind] for kind in types]


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """What the weights of a checkpoint are stored as: MXFP4, or FP8 with a factor for each block of rows and columns.

    `block`: of FP8; None: one factor a tensor.
    """

    method: Literal["mxfp4", "fp8"]
    block: tuple[int, int] | None = None


def read_quantisation(values: Mapping[str, Any]) -> Quantisation | None:
    """What a config.json says about the blocks of its weights; None where they are plain numbers.

    Raises:
      ValueError: a kind that is not implemented, or a malformed field; one line that names it.
    """
    fields = Fields(values).section("quantization_config")
    if not fields.values:
        return None
    method = fields.get("quant_method", str, None)
    plain = fields.get("modules_to_not_convert", list, None) or []  # the tensors say the same
    if not all(isinstance(name, str) for name in plain):
        raise ValueError("field 'quantization_config.modules_to_not_convert' holds something else than names")
    if method == "mxfp4":
        return Quantisation("mxfp4")
    if method != "fp8":
        raise ValueError(
            f"field 'quantization_config' has quant_method {method!r}; streamjax dequantises mxfp4 and fp8: take the "
            "checkpoint that was not quantised"
        )
    block = fields.get("weight_block_size", list, None)
    if block is None:
        return Quantisation("fp8")
    if len(block) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in block):
        raise ValueError(f"field 'quantization_config.weight_block_size' is {block!r}; expected two sizes")
    return Quantisation("fp8", (block[0], block[1]))
