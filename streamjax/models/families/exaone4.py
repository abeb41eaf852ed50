"""EXAONE 4 (2507.11407): norms behind the branches only, and over each head's queries and keys.

Where some layers have a window, the ones with full attention have no position.
"""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, ModelConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Table
from streamjax.models.families.llama import check_heads, read_positions, read_shapes, write_positions, write_shapes
from streamjax.models.families.no_position import with_rope, without_rope
from streamjax.models.families.window_fields import read_layer_types, write_layer_types


def _read(fields: Fields) -> ModelConfig:
    shapes = read_shapes(fields, norm_eps=1e-5)
    check_heads(shapes["d_model"], shapes["num_heads"])
    num_layers, window = shapes["num_layers"], fields.get("sliding_window", int, 4096)
    windows = read_layer_types(fields, num_layers, window, _default_types(fields, num_layers, window))
    config = UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 2048),
        family="exaone4",
        pre_norms=False,
        post_norms=True,
        qk_norm=True,
        windows=windows,
    )
    return without_rope(config.expand(), [window is not None and w is None for w in windows or (None,) * num_layers])


def _default_types(fields: Fields, num_layers: int, window: int | None) -> list[bool]:
    """Which layers have a window: all but every so many-th, or the L of a pattern of L and G that ends with a G."""
    pattern = fields.get("sliding_window_pattern", (int, str), 4)
    if isinstance(pattern, str):
        if not pattern or set(pattern) - {"L", "G"}:
            raise ValueError(
                f"field 'sliding_window_pattern' is {pattern[:40]!r}; expected letters L and G, or a number"
            )
        return [window is not None and pattern[i % len(pattern)] == "L" for i in range(num_layers - 1)] + [False]
    period = fields.integer("sliding_window_pattern", 4, least=0) if pattern is not None else 0
    return [window is not None and period > 0 and (i + 1) % period != 0 for i in range(num_layers)]


def _write(config: ModelConfig) -> dict[str, Any]:
    turning, still = with_rope(config)
    flat = UniformConfig.from_model_config(turning)
    layers = write_layer_types(flat, unused=4096 if all(still) else None)  # with a window, full layers have no position
    return {**write_shapes(flat), **write_positions(flat), **layers}


def _tensors(block: BlockConfig) -> Table:
    return {
        **tensor_tables.llama(block),
        **tensor_tables.norm("layers.mixer_post_norm", f"{tensor_tables.BLOCK}.post_attention_layernorm"),
        **tensor_tables.norm("layers.mlp_post_norm", f"{tensor_tables.BLOCK}.post_feedforward_layernorm"),
        **tensor_tables.qk_norms(f"{tensor_tables.BLOCK}.self_attn"),
    }


EXAONE4 = Family("exaone4", ("Exaone4ForCausalLM",), ("exaone4",), _read, _write, _tensors)
