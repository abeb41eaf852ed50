"""The metadata of an architecture in a GGUF file, as fields of a `config.json`; none is ignored by accident."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamjax.checkpoints.gguf_header import GGUFHeader

NUMBER, WHOLE, FLAG = float, int, bool
Keys = dict[str, tuple[str, type]]  # key behind the architecture's name -> field of config.json, and its kind

SIZES: Keys = {
    "context_length": ("max_position_embeddings", WHOLE),
    "embedding_length": ("hidden_size", WHOLE),
    "block_count": ("num_hidden_layers", WHOLE),
    "feed_forward_length": ("intermediate_size", WHOLE),
    "attention.head_count": ("num_attention_heads", WHOLE),
}
GROUPS: Keys = {"attention.head_count_kv": ("num_key_value_heads", WHOLE)}
RMS: Keys = {"attention.layer_norm_rms_epsilon": ("rms_norm_eps", NUMBER)}
ROPE: Keys = {"rope.freq_base": ("rope_theta", NUMBER)}
HEAD: Keys = {"attention.key_length": ("head_dim", WHOLE)}
EXPERTS: Keys = {
    "expert_count": ("num_local_experts", WHOLE),
    "expert_used_count": ("num_experts_per_tok", WHOLE),
}
WINDOW: Keys = {"attention.sliding_window": ("sliding_window", WHOLE)}
CAPS: Keys = {
    "attn_logit_softcapping": ("attn_logit_softcapping", NUMBER),
    "final_logit_softcapping": ("final_logit_softcapping", NUMBER),
}
# What repeats what tensors and other keys say, or says how the file came about.
_KNOWN = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "attention.causal", "rope.dimension_count")
_UNSCALED = ("none", "")


class Metadata:
    """The keys of one architecture, with those that have been looked at."""

    def __init__(self, header: GGUFHeader):
        self.header = header
        self.architecture: str = header.get("general.architecture", str)
        self.seen: set[str] = set()

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value by its key without the architecture's name; a list with one value for all layers is that value.

        Raises:
          ValueError: it is of another kind, or has different values for the layers.
        """
        self.seen.add(key)
        name = f"{self.architecture}.{key}"
        value = self.header.values.get(name)
        if kind is int and isinstance(value, np.ndarray):
            if value.dtype.kind not in "iu" or len(value) == 0 or np.any(value != value[0]):
                raise ValueError(
                    f"{self.header.file}: {name!r} differs from layer to layer, which streamjax does not read"
                )
            return int(value[0])
        return self.header.get(name, kind, default)

    def fields(self, keys: Keys) -> dict[str, Any]:
        """The fields of config.json that the keys stand for, as far as the file has them."""
        found = {field: self.get(key, kind) for key, (field, kind) in keys.items()}
        return {field: value for field, value in found.items() if value is not None}

    def layer_types(self, values: dict[str, Any]) -> dict[str, Any]:
        """`layer_types` of config.json, where the file says which layers slide: one by one, or all but every n-th."""
        self.seen.add("attention.sliding_window_pattern")
        pattern = self.header.values.get(f"{self.architecture}.attention.sliding_window_pattern")
        if isinstance(pattern, int) and pattern:
            pattern = np.array([(layer + 1) % pattern != 0 for layer in range(values.get("num_hidden_layers", 0))])
        if not isinstance(pattern, np.ndarray):
            return {}
        return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern.tolist()]}

    def has(self, tensor: str) -> bool:
        """Whether the file has a tensor."""
        return tensor in self.header.tensors

    def numbers(self, tensor: str) -> list[float]:
        """The values of a small float32 tensor, such as the factors of a rotation.

        Raises:
          ValueError: it is none.
        """
        stored = self.header.tensors[tensor]
        if stored.kind.name != "F32" or len(stored.shape) != 1:
            raise ValueError(
                f"{self.header.file}: tensor {tensor!r} is {stored.kind.name}{list(stored.shape)}; expected F32"
            )
        with self.header.file.open("rb") as stream:
            stream.seek(stored.offset)
            return np.frombuffer(stream.read(stored.row_bytes), "<f4").tolist()

    def scaling(self) -> dict[str, Any] | None:
        """`rope_scaling` of config.json.

        Raises:
          ValueError: a kind that is not known.
        """
        kind = self.get("rope.scaling.type", str, "none")
        factor = self.get("rope.scaling.factor", float) or self.get("rope.scale_linear", float)
        original = self.get("rope.scaling.original_context_length", int)
        attention = self.get("rope.scaling.attn_factor", float)
        if self.has("rope_freqs.weight"):  # the factors of Llama 3, computed by whoever wrote the file
            factors = self.numbers("rope_freqs.weight")
            values = {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
            return values | {"short_factor": factors, "long_factor": factors}
        if self.has("rope_factors_long.weight") and self.has("rope_factors_short.weight"):
            values = {"rope_type": "longrope"} | {
                f"{length}_factor": self.numbers(f"rope_factors_{length}.weight") for length in ("short", "long")
            }
            return values | ({} if attention is None else {"attention_factor": attention})
        if kind in _UNSCALED or (kind == "linear" and factor in (None, 0.0, 1.0)):
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind != "yarn":
            raise ValueError(f"{self.header.file}: '{self.architecture}.rope.scaling.type' is {kind[:40]!r}, not known")
        values = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for name in ("beta_fast", "beta_slow"):
            values[name] = self.get(f"rope.scaling.yarn_{name}", float)
        if attention is not None and attention != 1.0:
            values["attention_factor"] = attention * (1 + 0.1 * float(np.log(factor or 1.0)))
        return {name: value for name, value in values.items() if value is not None}

    def unread(self) -> list[str]:
        """Keys of the architecture that nobody has looked at and that hold something."""
        prefix = f"{self.architecture}."
        names = (key.removeprefix(prefix) for key in self.header.values if key.startswith(prefix))
        rest = [name for name in names if name not in self.seen and name not in _KNOWN]
        return [name for name in rest if np.any(np.asarray(self.header.values[prefix + name]) != 0)]
