"""What the folders of models have in common: replaced whole, and checked before a model of their size is built."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streamjax.checkpoints import replaced_folder
from streamjax.models.files.safetensors_files import is_weights

CONFIG = "config.json"
_LAYERS = frozenset(("num_hidden_layers", "n_layer", "n_layers", "num_layers"))
_HEADS = frozenset(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads", "num_kv_heads"))
_EXPERTS = frozenset(("num_local_experts", "num_experts", "n_routed_experts"))
_OF_CHECKPOINTS = frozenset((CONFIG, "arrays", "about", "_CHECKPOINT_METADATA"))


@contextlib.contextmanager
def replaced_model(path: str | Path, values: Mapping[str, Any]) -> Iterator[Path]:
    """A new folder for weights, with `values` as its config.json, that takes the place of the model at `path`.

    A tokenizer, or whatever else is in the old folder, stays.
    """
    with replaced_folder(path, lambda name: is_weights(name) or name in _OF_CHECKPOINTS) as folder:
        yield folder
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_sizes(file: Path, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Refuse a config.json that asks for more layers, heads or experts than the weights can have, before anything is
    built.

    Args:
      file: the config.json.
      values: its fields.
      tensors: what there is; each has a shape.
    """
    widest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for section in (values, values.get("text_config"), values.get("model")):
        for name, value in section.items() if isinstance(section, dict) else ():
            limit = len(tensors) if name in _LAYERS else widest if name in _HEADS or name == "head_dim" else 2**53
            limit = max(len(tensors), widest) if name in _EXPERTS else limit
            if isinstance(value, int) and value > limit:
                there = f"there are {len(tensors)} tensors, the longest axis of which has {widest} places"
                raise ValueError(f"{file}: field {name!r} is {value}, and {there}: they do not belong together")
