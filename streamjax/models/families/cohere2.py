"""Cohere2 (Command R7B and Command A, 2504.00698): parallel branches behind one LayerNorm, windows, scaled logits.

Layers with a window rotate, in pairs of neighbouring channels; those with full attention have no position.
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
    _check_layout(fields)
    shapes = read_shapes(fields, tie=True)
    shapes["norm_eps"] = fields.positive("layer_norm_eps", 1e-5)
    check_heads(shapes["d_model"], shapes["num_heads"])
    if shapes["head_dim"] != shapes["d_model"] // shapes["num_heads"]:
        raise ValueError(
            f"field 'head_dim' is {shapes['head_dim']}; this architecture divides hidden_size by the heads"
        )
    num_layers, bias = shapes["num_layers"], fields.flag("attention_bias", False)
    period = fields.integer("sliding_window_pattern", fields.integer("layer_switch", 4))
    window = fields.get("sliding_window", int, 4096)
    windows = read_layer_types(fields, num_layers, window, [(i + 1) % period != 0 for i in range(num_layers)])
    config = UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 8192),
        family="cohere2",
        norm="layer",
        parallel_residual=True,
        shared_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        logit_scale=fields.positive("logit_scale", 0.0625),
        windows=windows,
    )
    return without_rope(config.expand(), [w is None for w in windows or (None,) * num_layers])


def _check_layout(fields: Fields) -> None:
    """Refuse what Cohere's own files can ask for and the architecture does not have."""
    fields.only("position_embedding_type", (None, "rope_gptj"))
    fields.only("order_of_interleaved_layers", (None, "local_attn_first"))
    fields.only("rotary_pct", (None, 1.0))
    fields.only("use_qk_norm", (None, False))
    fields.only("use_parallel_block", (None, True))
    fields.only("use_gated_activation", (None, True))
    fields.seen.update(("use_embedding_sharing", "use_parallel_embedding"))  # the first is tie_word_embeddings


def _write(config: ModelConfig) -> dict[str, Any]:
    flat = UniformConfig.from_model_config(with_rope(config)[0])
    shapes = write_shapes(flat)
    shapes["layer_norm_eps"] = shapes.pop("rms_norm_eps")
    return {
        **shapes,
        **write_positions(flat),
        **write_layer_types(flat, unused=4096),
        "attention_bias": flat.qkv_bias,
        "logit_scale": flat.logit_scale,
    }


def _tensors(block: BlockConfig) -> Table:
    attention, pairs = f"{tensor_tables.BLOCK}.self_attn", block.attention.head_dim  # in layers without a position too
    return {**tensor_tables.llama(block), **tensor_tables.qkv(block, attention, pairs)}


COHERE2 = Family("cohere2", ("Cohere2ForCausalLM",), ("cohere2",), _read, _write, _tensors)
