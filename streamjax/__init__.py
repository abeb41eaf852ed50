"""streamjax: language models over endless token streams in bounded memory. `import streamjax as sj`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from streamjax import kv
from streamjax.models import Decoder, HSAConfig, LoRAParam, ModelConfig, RopeConfig, add_lora, forward, merge_lora
from streamjax.streaming import Sampler, StreamState, generate, generate_blocks, init_state, read, score, step

if TYPE_CHECKING:
    from streamjax import data, training
    from streamjax.checkpoints import load, load_stream, save, save_stream
    from streamjax.data import load_tokenizer
    from streamjax.models.hf import save_hf
    from streamjax.models.lora_files import load_lora, save_lora
    from streamjax.models.native import save_safetensors
    from streamjax.streaming.session import Session

# Names whose modules pull in checkpoint or data libraries load on first use: `import streamjax` stays quick.
_LAZY = {
    "Session": "streamjax.streaming.session",
    "load": "streamjax.checkpoints",
    "load_lora": "streamjax.models.lora_files",
    "load_stream": "streamjax.checkpoints",
    "load_tokenizer": "streamjax.data",
    "save": "streamjax.checkpoints",
    "save_hf": "streamjax.models.hf",
    "save_lora": "streamjax.models.lora_files",
    "save_safetensors": "streamjax.models.native",
    "save_stream": "streamjax.checkpoints",
}
_MODULES = ("data", "training")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"streamjax.{name}")
    raise AttributeError(f"module 'streamjax' has no attribute {name!r}")


__all__ = [
    "Decoder",
    "HSAConfig",
    "LoRAParam",
    "ModelConfig",
    "RopeConfig",
    "Sampler",
    "Session",
    "StreamState",
    "add_lora",
    "data",
    "forward",
    "generate",
    "generate_blocks",
    "init_state",
    "kv",
    "load",
    "load_lora",
    "load_stream",
    "load_tokenizer",
    "merge_lora",
    "read",
    "save",
    "save_hf",
    "save_lora",
    "save_safetensors",
    "save_stream",
    "score",
    "step",
    "training",
]
