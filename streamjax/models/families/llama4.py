"""Llama 4 (Meta, 2025): attention within chunks, layers without positions, and an expert a token.

Layers that rotate attend within chunks of `attention_chunk_size` tokens and norm queries and keys without weights,
which commutes with the rotation; the others see everything, and their queries grow with their position. Experts read
their tokens times a sigmoid of the router's logit, beside a shared expert. Some layers may have a dense MLP instead. A
multimodal checkpoint loads as its language model: the tensors of the vision model and its projector are left alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from streamjax.models.config import (
    BlockConfig,
    DenseConfig,
    ExpertsConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    TemperatureConfig,
    UniformConfig,
)
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields, by_layer
from streamjax.models.families.experts_fields import read_experts, the_experts, with_mlps
from streamjax.models.families.family import Family, Source, Table
from streamjax.models.families.llama import read_positions, read_shapes, write_positions, write_shapes
from streamjax.models.families.no_position import read_no_rope_layers, with_rope
from streamjax.models.rope import make_rotary

_MLP = f"{tensor_tables.BLOCK}.feed_forward"
_VISION = "vision_config boi_token_index eoi_token_index image_token_index boi_token_id eoi_token_id image_token_id"
_TYPES = {"chunked_attention": True, "full_attention": False}


def _read(fields: Fields) -> ModelConfig:
    text = fields
    if "text_config" in fields.values:
        text = fields.section("text_config")
        fields.seen.update(_VISION.split())
    shapes = read_shapes(text, head_dim=128, kv_heads=8, norm_eps=1e-5)
    shapes["tie_embeddings"] = fields.flag("tie_word_embeddings", shapes["tie_embeddings"])
    bias, layers = text.flag("attention_bias", False), shapes["num_layers"]
    if text.get("no_rope_layers", list, None) == []:
        text.values["no_rope_layers"] = None
    still = read_no_rope_layers(text, layers)
    chunks = _read_chunks(text, still)
    config = UniformConfig(
        **{**shapes, "mlp_dim": text.integer("intermediate_size_mlp", 16_384)},
        **read_positions(text, shapes["head_dim"], 131_072, theta=500_000.0),
        family="llama4",
        qkv_bias=bias,
        out_bias=bias,
    )
    model = with_mlps(config, _read_mlps(text, config))
    norm = NormConfig(eps=config.norm_eps, weight=False) if text.flag("use_qk_norm", True) else None
    if norm is not None and make_rotary(config.rope, config.head_dim, config.max_position).scale != 1.0:
        raise ValueError(f"field 'use_qk_norm' is true: a rotation of kind {config.rope.kind!r} scales what it undoes")
    tuned = text.get("attn_temperature_tuning", (bool, int), True)
    scale, length = text.number("attn_scale", 0.1), text.integer("floor_scale", 8192)
    if scale < 0:
        raise ValueError(f"field 'attn_scale' is {scale}; it must not be negative")
    rule = TemperatureConfig(scale, length, start=1) if tuned and scale else None
    blocks = [
        block.with_mixer(chunk=chunk, **({"rope": None, "temperature": rule} if marked else {"qk_norm": norm}))
        for block, marked, chunk in zip(model.blocks, still, chunks, strict=True)
    ]
    return model.replace(blocks=tuple(blocks))


def _read_chunks(fields: Fields, still: list[bool]) -> list[int | None]:
    """The attention chunk of each layer; where `layer_types` is silent, layers that rotate have one."""
    size = fields.optional_integer("attention_chunk_size", 8192)
    types = fields.get("layer_types", list, None)
    if types is None:
        return [None if marked else size for marked in still]
    chunked = by_layer(types, _TYPES, len(still), "this architecture")
    if size is None and any(chunked):
        raise ValueError("field 'layer_types' has chunked layers, but 'attention_chunk_size' is null")
    return [size if one else None for one in chunked]


def _read_mlps(fields: Fields, config: UniformConfig) -> list[MLPConfig]:
    """The MLP of each layer; where `moe_layers` is silent, every so many-th layer has experts."""
    step = fields.integer("interleave_moe_layer_step", 1)
    sparse = fields.get("moe_layers", list, None)
    if sparse is None:
        sparse = list(range(step - 1, config.num_layers, step))
    if any(type(layer) is not int or not 0 <= layer < config.num_layers for layer in sparse):
        raise ValueError(f"field 'moe_layers' must have numbers of the {config.num_layers} layers")
    width, activation = "intermediate_size", config.activation
    experts = dataclasses.replace(
        read_experts(fields, count=16, each=1, width=width, normalize=False, activation=activation,
                     counts=("num_local_experts",)),
        shared=DenseConfig(fields.integer(width), activation=activation),
        scores="sigmoid",
        weighted="inputs",
    )  # fmt: skip
    dense = DenseConfig(config.mlp_dim, activation=activation)
    return [experts if layer in sparse else dense for layer in range(config.num_layers)]


def _write(config: ModelConfig) -> dict[str, Any]:
    turning, still = with_rope(config)
    mixers = [block.mixer for block in config.blocks]
    sparse = [i for i, block in enumerate(config.blocks) if isinstance(block.mlp, ExpertsConfig)]
    experts = the_experts(config) if sparse else None
    dense = next((block.mlp for block in config.blocks if isinstance(block.mlp, DenseConfig)), None)
    rule = next((mixer.temperature for mixer in mixers if mixer.temperature is not None), None)
    plain = dense or DenseConfig(the_experts(config).mlp_dim, activation=the_experts(config).activation)
    blocks = [
        dataclasses.replace(block.with_mixer(chunk=None, temperature=None, qk_norm=None), mlp=plain)
        for block in turning.blocks
    ]
    flat = UniformConfig.from_model_config(turning.replace(blocks=tuple(blocks)))
    return {
        **write_shapes(flat),
        **write_positions(flat),
        "intermediate_size_mlp": flat.mlp_dim,
        "intermediate_size": flat.mlp_dim if experts is None else experts.mlp_dim,
        "num_local_experts": 1 if experts is None else experts.num_experts,
        "num_experts_per_tok": 1 if experts is None else experts.experts_per_token,
        "moe_layers": sparse,
        "no_rope_layers": [int(not marked) for marked in still],
        "layer_types": ["full_attention" if mixer.chunk is None else "chunked_attention" for mixer in mixers],
        "attention_chunk_size": next((mixer.chunk for mixer in mixers if mixer.chunk is not None), None),
        "use_qk_norm": any(mixer.qk_norm is not None for mixer in mixers),
        "attn_temperature_tuning": rule is not None,
        **({} if rule is None else {"attn_scale": rule.beta, "floor_scale": rule.length}),
        "attention_bias": flat.qkv_bias,
    }


def _tensors(block: BlockConfig) -> Table:
    pairs = block.attention.head_dim  # in layers without a position too
    attention = {
        **tensor_tables.without_mlp(block),
        **tensor_tables.qkv(block, f"{tensor_tables.BLOCK}.self_attn", pairs),
    }
    if not isinstance(block.mlp, ExpertsConfig):
        return {**attention, **tensor_tables.gate_up(_MLP), **tensor_tables.down(f"{_MLP}.down_proj")}
    return {
        **attention,
        "layers.mlp.router": (Source(f"{_MLP}.router.weight", "x e -> e x"),),
        "layers.mlp.up": (Source(f"{_MLP}.experts.gate_up_proj", "x e (g f) -> x e g f"),),
        "layers.mlp.down": (Source(f"{_MLP}.experts.down_proj", "x f e -> x f e"),),
        **tensor_tables.gate_up(f"{_MLP}.shared_expert", "layers.mlp.shared"),
        **tensor_tables.down(f"{_MLP}.shared_expert.down_proj", "layers.mlp.shared"),
    }


LLAMA4 = Family(
    "llama4",
    ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    ("llama4_text", "llama4"),
    _read,
    _write,
    _tensors,
    renames=tensor_tables.MULTIMODAL_RENAMES,
    ignored=(r"^(model\.)?(vision_model|multi_modal_projector)\.",),
)
