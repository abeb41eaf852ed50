"""Qwen2 and Qwen2.5 (2407.10671, 2412.15115), and Qwen3 (2505.09388): biases on queries, keys and values,
or norms over the heads instead."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Table, of_uniform
from streamjax.models.families.llama import read_positions, read_shapes, write_positions, write_shapes
from streamjax.models.families.window_fields import read_layer_types, write_layer_types


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """A window on the layers from `max_window_layers` on, or as `layer_types` lists them."""
    window = fields.get("sliding_window", int, 4096)
    first = fields.integer("max_window_layers", 28, least=0)
    if not fields.flag("use_sliding_window", False):
        window = None
    default = [window is not None and i >= first for i in range(num_layers)]
    return read_layer_types(fields, num_layers, window, default)


def _write_windows(config: UniformConfig) -> dict[str, Any]:
    layers = write_layer_types(config)
    first = next((i for i, window in enumerate(config.windows) if window is not None), config.num_layers)
    return {**layers, "use_sliding_window": first < config.num_layers, "max_window_layers": first}


def _read2(fields: Fields) -> UniformConfig:
    shapes = read_shapes(fields, kv_heads=32)
    return UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 32768),
        family="qwen2",
        qkv_bias=True,
        windows=_windows(fields, shapes["num_layers"]),
    )


def _write2(config: UniformConfig) -> dict[str, Any]:
    return {**write_shapes(config), **write_positions(config), **_write_windows(config)}


def _read3(fields: Fields) -> UniformConfig:
    shapes = read_shapes(fields, head_dim=128, kv_heads=32)
    bias = fields.flag("attention_bias", False)
    return UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 32768),
        family="qwen3",
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        windows=_windows(fields, shapes["num_layers"]),
    )


def _write3(config: UniformConfig) -> dict[str, Any]:
    return {**_write2(config), "attention_bias": config.qkv_bias}


def _tensors3(block: BlockConfig) -> Table:
    return {**tensor_tables.llama(block), **tensor_tables.qk_norms(f"{tensor_tables.BLOCK}.self_attn")}


QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), _read2, of_uniform(_write2), tensor_tables.llama)
QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), _read3, of_uniform(_write3), _tensors3)
