"""Ministral 3 (Mistral AI, 2025): Llama with YaRN and queries that grow with their position.

A multimodal checkpoint loads as its language model: the tensors of the vision tower and its projector are left alone.
"""

from __future__ import annotations

from typing import Any

from streamjax.models.config import ModelConfig, TemperatureConfig, UniformConfig
from streamjax.models.families import tensor_tables
from streamjax.models.families.config_fields import Fields
from streamjax.models.families.family import Family
from streamjax.models.families.llama import read_shapes, write_shapes
from streamjax.models.families.rope_fields import parse_rope, write_scaling
from streamjax.models.families.window_fields import read_uniform, write_uniform

_BETA, _ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"
_DEFAULT = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, _ORIGINAL: 16_384, _BETA: 0.1}
_VISION = "vision_config image_token_index projector_hidden_act multimodal_projector_bias spatial_merge_size"


def _read(fields: Fields) -> ModelConfig:
    text = fields
    if "text_config" in fields.values:
        text = fields.section("text_config")
        if text.values.get("model_type") != "ministral3":
            kind = str(text.values.get("model_type"))[:40]
            raise ValueError(f"field 'text_config.model_type' is {kind!r}; streamjax has 'ministral3' here")
        fields.seen.update((*_VISION.split(), "vision_feature_layer"))
    shapes = read_shapes(text, head_dim=128, kv_heads=8, norm_eps=1e-5)
    shapes["tie_embeddings"] = fields.flag("tie_word_embeddings", shapes["tie_embeddings"])
    max_position = text.integer("max_position_embeddings", 262_144)
    scaling = text.get("rope_parameters", dict, None) or text.get("rope_scaling", dict, None) or _DEFAULT
    theta = text.positive("rope_theta", 1_000_000.0)
    own = Fields({name: scaling.get(name) for name in (_BETA, _ORIGINAL)})
    scaling = {name: value for name, value in scaling.items() if name not in (_BETA, "max_position_embeddings")}
    config = UniformConfig(
        **shapes,
        family="ministral3",
        max_position=max_position,
        rope=parse_rope(scaling, head_dim=shapes["head_dim"], max_position=max_position, theta=theta),
        windows=read_uniform(text, shapes["num_layers"], None),
    )
    beta = own.number(_BETA, 0.0)
    if beta < 0:
        raise ValueError(f"field {_BETA!r} is {beta}; it must not be negative")
    rule = TemperatureConfig(beta, own.integer(_ORIGINAL, max_position)) if beta else None
    return _with(config.expand(), rule)


def _with(config: ModelConfig, rule: TemperatureConfig | None) -> ModelConfig:
    """The model with one temperature in all layers."""
    return config.replace(blocks=tuple(block.with_mixer(temperature=rule) for block in config.blocks))


def _write(config: ModelConfig) -> dict[str, Any]:
    flat, rule = UniformConfig.from_model_config(_with(config, None)), config.blocks[0].mixer.temperature
    parameters = {
        "rope_type": "default",
        _ORIGINAL: flat.max_position if rule is None else rule.length,
        **(write_scaling(flat.rope) or {}),
        "rope_theta": flat.rope.theta,
        _BETA: 0.0 if rule is None else rule.beta,
    }
    return {**write_shapes(flat), **write_uniform(flat), "rope_parameters": parameters}


MINISTRAL3 = Family(
    "ministral3",
    ("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    ("ministral3", "mistral3"),
    _read,
    _write,
    tensor_tables.llama,
    renames=tensor_tables.MULTIMODAL_RENAMES,
    ignored=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
)
