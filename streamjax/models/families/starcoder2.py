"""StarCoder2 (2402.19173): LayerNorm, a plain MLP, biases and one sliding window for all layers."""

from __future__ import annotations

from typing import Any

from streamjax.models.config import BlockConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family, Table, of_uniform
from streamjax.models.families.llama import read_positions, read_shapes, write_positions, write_shapes
from streamjax.models.families.window_fields import read_uniform, write_uniform


def _read(fields: Fields) -> UniformConfig:
    fields.values.setdefault("hidden_act", "gelu_pytorch_tanh")
    shapes = read_shapes(fields, kv_heads=2, tie=True)
    shapes["norm_eps"] = fields.positive("norm_epsilon", 1e-5)
    fields.only("norm_type", (None, "layer_norm"))
    fields.only("mlp_type", (None, "default"))
    fields.only("layer_norm_epsilon", (None, shapes["norm_eps"]))  # the same again, where there is one
    bias = fields.flag("use_bias", True)
    return UniformConfig(
        **shapes,
        **read_positions(fields, shapes["head_dim"], 4096),
        family="starcoder2",
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        windows=read_uniform(fields, shapes["num_layers"], None),
    )


def _write(config: UniformConfig) -> dict[str, Any]:
    shapes = write_shapes(config)
    shapes["norm_epsilon"] = shapes.pop("rms_norm_eps")
    return {**shapes, **write_positions(config), **write_uniform(config), "use_bias": config.qkv_bias}


def _tensors(block: BlockConfig) -> Table:
    return {
        **tensor_tables.llama(block),
        **tensor_tables.up(f"{tensor_tables.BLOCK}.mlp.c_fc"),
        **tensor_tables.down(f"{tensor_tables.BLOCK}.mlp.c_proj"),
    }


STARCODER2 = Family("starcoder2", ("Starcoder2ForCausalLM",), ("starcoder2",), _read, of_uniform(_write), _tensors)
