"""streamjax: language models over endless token streams in bounded memory. `import streamjax as sj`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamjax.lazy_names import lazy_names

if TYPE_CHECKING:
    from streamjax import data, kv, serving, training
    from streamjax.data import load_tokenizer
    from streamjax.models import (
        AttentionConfig,
        BlockConfig,
        Decoder,
        DenseConfig,
        HSAConfig,
        LoRAParam,
        ModelConfig,
        NormConfig,
        RopeConfig,
        UniformConfig,
        add_lora,
        forward,
        merge_lora,
    )
    from streamjax.models.files.checkpoint import load, save
    from streamjax.models.files.hugging_face import save_hf
    from streamjax.models.files.native_format import save_safetensors
    from streamjax.models.files.peft import load_lora, save_lora
    from streamjax.serving.engine import Engine
    from streamjax.streaming import (
        Sampler,
        StreamState,
        compact,
        generate,
        generate_blocks,
        init_state,
        lazy_layers,
        measure_budget,
        measure_codebooks,
        measure_factors,
        measure_filters,
        read,
        reconstruction,
        score,
        step,
    )
    from streamjax.streaming.reuse import AnchorPool, EncodedChunk, edit, encode_chunk, join, side_by_side
    from streamjax.streaming.saving.saved_streams import load_stream, save_stream
    from streamjax.streaming.session import Session
    from streamjax.streaming.side_networks import with_side_network
    from streamjax.streaming.speculative import NGrams, SmallModel

# Everything loads on first use. `import streamjax` then takes no time, and a command can answer Ctrl-C while JAX loads.
_HOMES = {
    "streamjax.data": ("load_tokenizer",),
    "streamjax.models": (
        "AttentionConfig", "BlockConfig", "Decoder", "DenseConfig", "HSAConfig", "LoRAParam", "ModelConfig",
        "NormConfig", "RopeConfig", "UniformConfig", "add_lora", "forward", "merge_lora",
    ),
    "streamjax.models.files.checkpoint": ("load", "save"),
    "streamjax.models.files.hugging_face": ("save_hf",),
    "streamjax.models.files.native_format": ("save_safetensors",),
    "streamjax.models.files.peft": ("load_lora", "save_lora"),
    "streamjax.serving.engine": ("Engine",),
    "streamjax.streaming": (
        "Sampler", "StreamState", "compact", "generate", "generate_blocks", "init_state", "lazy_layers",
        "measure_budget", "measure_codebooks", "measure_factors", "measure_filters", "read", "read_prefix",
        "reconstruction", "score", "step",
    ),
    "streamjax.streaming.reuse": ("AnchorPool", "EncodedChunk", "edit", "encode_chunk", "join", "side_by_side"),
    "streamjax.streaming.saving.saved_streams": ("load_stream", "save_stream"),
    "streamjax.streaming.session": ("Session",),
    "streamjax.streaming.side_networks": ("with_side_network",),
    "streamjax.streaming.speculative": ("NGrams", "SmallModel"),
}  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__, _HOMES, ("data", "kv", "serving", "training"))

__all__ = [
    "AnchorPool",
    "AttentionConfig",
    "BlockConfig",
    "Decoder",
    "DenseConfig",
    "EncodedChunk",
    "Engine",
    "HSAConfig",
    "LoRAParam",
    "ModelConfig",
    "NGrams",
    "NormConfig",
    "RopeConfig",
    "Sampler",
    "Session",
    "SmallModel",
    "StreamState",
    "UniformConfig",
    "add_lora",
    "compact",
    "data",
    "edit",
    "encode_chunk",
    "forward",
    "generate",
    "generate_blocks",
    "init_state",
    "join",
    "kv",
    "lazy_layers",
    "load",
    "load_lora",
    "load_stream",
    "load_tokenizer",
    "measure_budget",
    "measure_codebooks",
    "measure_factors",
    "measure_filters",
    "merge_lora",
    "read",
    "read_prefix",
    "reconstruction",
    "save",
    "save_hf",
    "save_lora",
    "save_safetensors",
    "save_stream",
    "score",
    "serving",
    "side_by_side",
    "step",
    "training",
    "with_side_network",
]
