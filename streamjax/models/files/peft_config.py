"""PEFT's adapter_config.json: what it says of each module, and what is refused by name."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamjax.checkpoints import read_json
from streamjax.models.files.module_patterns import matching_key, names_module

CONFIG = "adapter_config.json"
# Fields that mean another computation, unless they are empty.
_OTHER_METHODS = (
    *("use_qalora", "use_bdlora", "lora_bias", "layer_replication", "arrow_config", "kasa_config", "monteclora_config"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "velora_config"),
)
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # all others change the base's weights too
_LAYER = re.compile(r"\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of a file that describes LoRA adapters (2106.09685), or DoRA ones (2402.09353)."""

    file: Path
    values: Mapping[str, Any]

    @property
    def dora(self) -> bool:
        """Whether each module has magnitudes for the rows of its changed weights."""
        return bool(self.values.get("use_dora"))

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Of a module's factors: their rank, and what their product is multiplied by.

        Raises:
          ValueError: a number that makes no sense, or a pattern that is none.
        """
        rank, alpha = self._number("r", "rank_pattern", module), self._number("lora_alpha", "alpha_pattern", module)
        if rank != int(rank):
            raise ValueError(f"{self.file}: the rank of {module} is {rank}: a whole number is needed")
        return int(rank), alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def demands(self, module: str) -> bool:
        """Whether the file says that a module has an adapter; False too where only a pattern could tell."""
        targets, excluded = self.values.get("target_modules"), self.values.get("exclude_modules")
        if not isinstance(targets, list) or not names_module(targets, module):
            return False
        if excluded and (not isinstance(excluded, list) or names_module(excluded, module)):
            return False
        layers = self.values.get("layers_to_transform")
        layer = _LAYER.search(module)
        if layers is None or layers == [] or layer is None:
            return True
        return int(layer[1]) in (layers if isinstance(layers, list) else [layers])

    def saves_whole(self, module: str) -> bool:
        """Whether the module was trained whole, apart from any that it is tied to."""
        saved = self.values.get("modules_to_save") or []
        return names_module(saved, module) and not self.values.get("ensure_weight_tying")

    def _number(self, field: str, patterns: str, module: str) -> float:
        special = self.values.get(patterns) or {}
        if not isinstance(special, dict):
            raise ValueError(f"{self.file}: field {patterns!r} is {special!r:.80}; an object is expected")
        try:
            key = matching_key(special, module)
        except ValueError as error:
            raise ValueError(f"{self.file}: field {patterns!r}: {error}") from error
        name, value = (field, self.values.get(field)) if key is None else (patterns, special[key])
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{self.file}: field {name!r} has {value!r} for {module}: a positive number is needed")
        return value


def read_adapter_config(file: Path) -> AdapterConfig:
    """An adapter_config.json, if it describes what can be computed here.

    Raises:
      ValueError: it is damaged, or of a method that is not implemented; one line that names the field.
    """
    values = read_json(file)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {values.get('peft_type')!r}; only 'LORA' is read")
    for name in _OTHER_METHODS:
        if values.get(name):
            raise ValueError(f"{file}: field {name!r} is {values[name]!r:.80}, which is not implemented")
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"{file}: field 'bias' is {values['bias']!r}; it must be 'none', 'all' or 'lora_only'")
    method = values.get("init_lora_weights")
    if not isinstance(method, str | bool | None) or method not in _INITS:
        raise ValueError(f"{file}: init_lora_weights {method!r} changes the base model too: convert it with PEFT first")
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"):
        kind = int if name == "layers_to_transform" else str
        value = values.get(name)
        if not (value is None or isinstance(value, kind) or _is_list_of(kind, value)):
            raise ValueError(f"{file}: field {name!r} is {value!r:.80}; a list of {kind.__name__} is expected")
    return AdapterConfig(file, values)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def adapter_config(about: Mapping[str, tuple[int, float]], base: str | None) -> dict[str, Any]:
    """adapter_config.json of modules with these ranks and alphas."""
    about = {module: (rank, int(alpha) if alpha == int(alpha) else alpha) for module, (rank, alpha) in about.items()}
    rank, alpha = next(iter(about.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(about),
        "rank_pattern": {module: r for module, (r, _) in about.items() if r != rank},
        "alpha_pattern": {module: a for module, (_, a) in about.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }
