"""GGUF files of tiny models and tokenizers, written by the gguf package's own writer as llama.cpp's converter would."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

F32 = gguf.GGMLQuantizationType.F32
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One entry of the metadata, of the type that llama.cpp's converter writes."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_gguf(
    file: Path,
    architecture: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """Write a file.

    Args:
      file: where to.
      architecture: "general.architecture".
      values: metadata, keys without the architecture's name.
      tensors: float32 values by GGUF's names; or bytes, uint8, of blocks that need no quantisation.
      kinds: of the tensors; F32 where a tensor has none.
      tokenizer: metadata, keys behind "tokenizer.", with "ggml." where they have it.
    """
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in values.items():
        add_value(writer, f"{architecture}.{key}", value)
    for key, value in (tokenizer or {}).items():
        add_value(writer, f"tokenizer.{key}", value)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name, F32)
        data = tensor if tensor.dtype == np.uint8 else gguf.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def byte_tokenizer(specials: Sequence[str] = ("<|start|>", "<|end|>")) -> dict[str, Any]:
    """A "gpt2" tokenizer of single bytes, one merge, and special tokens that begin and end a text."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(0x100, 0x200))
    letters = [chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)]
    tokens = [*letters, "he", *specials]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": [NORMAL] * 257 + [CONTROL] * len(specials),
        "ggml.merges": ["h e"],
        "ggml.bos_token_id": 257,
        "ggml.eos_token_id": 258,
        "chat_template": "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>{% endif %}",
    }


def tiny_llama(
    file: Path,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    vocab_size: int = 259,
    width: int = 32,
    layers: int = 1,
    values: Mapping[str, Any] | None = None,
    trained: int = 64,
) -> Path:
    """A Llama with random weights; two heads, one of keys."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    tensors = {"token_embd.weight": draw(vocab_size, width), "output_norm.weight": 1 + draw(width)}
    for layer in range(layers):
        shapes = {"attn_q": width, "attn_k": width // 2, "attn_v": width // 2, "attn_output": width}
        shapes |= {"ffn_gate": 2 * width, "ffn_up": 2 * width}
        tensors |= {f"blk.{layer}.{name}.weight": draw(rows, width) for name, rows in shapes.items()}
        tensors[f"blk.{layer}.ffn_down.weight"] = draw(width, 2 * width)
        tensors |= {f"blk.{layer}.{name}_norm.weight": 1 + draw(width) for name in ("attn", "ffn")}
    sizes = {
        "context_length": trained,
        "embedding_length": width,
        "block_count": layers,
        "feed_forward_length": 2 * width,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": width // 2,
        "rope.freq_base": 10000.0,
    }
    return write_gguf(file, "llama", sizes | dict(values or {}), tensors, kinds, tokenizer)
