"""Models with drawn weights, written in Hugging Face's layout: for what depends on shapes alone."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.reporting import in_own_process

SMOLLM2: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
TWO_GIGABYTES: Mapping[str, Any] = {  # about a billion parameters, with a vocabulary as large as Llama 3's
    **SMOLLM2,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
}

STDLIB_BYTE: Mapping[str, Any] = {  # the shape of models/stdlib_byte
    **SMOLLM2,
    "vocab_size": 259,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
}


def write_drawn(values: Mapping[str, Any], folder: str) -> str:
    """Write a model of a `config.json` with bfloat16 weights, in a process of its own; returns the folder."""
    in_own_process("benchmarks.models.drawn", folder, json.dumps(dict(values)))
    return folder


def load_or_draw(folder: str | None) -> tuple[Any, Any]:
    """The model in float32 and the tokenizer of a folder, or of SmolLM2's shape with drawn weights."""
    import streamjax as sj

    with tempfile.TemporaryDirectory() as temporary:
        path = folder or write_drawn(SMOLLM2, temporary)
        return sj.load(path, dtype="float32"), sj.load_tokenizer(path)


def _write(folder: str, values: Mapping[str, Any]) -> None:
    import jax
    import jax.numpy as jnp

    import streamjax as sj
    from streamjax.models.families import read_config

    sj.save_hf(sj.Decoder(read_config(values), jax.random.key(0), dtype=jnp.bfloat16), folder)


if __name__ == "__main__":
    _write(sys.argv[1], json.loads(sys.argv[2]))
    print("{}")
