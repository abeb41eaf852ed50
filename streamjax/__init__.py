"""streamjax: language models over endless token streams in bounded memory. `import streamjax as sj`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from streamjax import kv
from streamjax.models import Decoder, HSAConfig, LoRAParam, ModelConfig, RopeConfig, add_lora, forward, merge_lora
from streamjax.streaming import Sampler, StreamState, generate, generate_blocks, init_state, read, score, step

if TYPE_CHECKING:
    from streamjax import data, training
    from streamjax.data import load_tokenizer
    from streamjax.models.files.checkpoint import load, save
    from streamjax.models.files.hugging_face import save_hf
    from streamjax.models.files.native_format import save_safetensors
    from streamjax.models.files.peft import load_lora, save_lora
    from streamjax.streaming.saved_streams import load_stream, save_stream
    from streamjax.streaming.session import Session

# Names whose modules pull in checkpoint or data libraries load on first use: `import streamjax` stays quick.
_LAZY = {
    "Session": "streamjax.streaming.session",
    "load": "streamjax.models.files.checkpoint",
    "load_lora": "streamjax.models.files.peft",
    "load_stream": "streamjax.streaming.saved_streams",
    "load_tokenizer": "streamjax.data",
    "save": "streamjax.models.files.checkpoint",
    "save_hf": "streamjax.models.files.hugging_face",
    "save_lora": "streamjax.models.files.peft",
    "save_safetensors": "streamjax.models.files.native_format",
    "save_stream": "streamjax.streaming.saved_streams",
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
