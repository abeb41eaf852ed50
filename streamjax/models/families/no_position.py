"""Layers that do not rotate, in models whose layers are alike but for that and their windows.

Such a model is read and written as one whose layers all rotate; which ones do not is told apart from that.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamjax.models.config import ModelConfig, RopeConfig
from streamjax.models.families.config_fields import Fields


def read_no_rope_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Layers without a position: those with a 0 in `no_rope_layers`, or every so many-th one."""
    interval = fields.integer("no_rope_layer_interval", 4)
    turns = fields.get("no_rope_layers", list, None)
    if turns is None:
        return [(i + 1) % interval == 0 for i in range(num_layers)]
    if len(turns) < num_layers or any(type(turn) is not int or turn not in (0, 1) for turn in turns):
        raise ValueError(f"field 'no_rope_layers' must have a 0 or 1 for each of {num_layers} layers")
    return [turn == 0 for turn in turns[:num_layers]]


def without_rope(config: ModelConfig, layers: Sequence[bool]) -> ModelConfig:
    """The model without positions in the layers that `layers`, one flag a layer, marks."""
    still = {block: block.with_mixer(rope=None) for block in dict.fromkeys(config.blocks)}
    pairs = zip(config.blocks, layers, strict=True)
    return config.replace(blocks=tuple(still[block] if marked else block for block, marked in pairs))


def with_rope(config: ModelConfig) -> tuple[ModelConfig, list[bool]]:
    """The model with the rotation of the others in layers that have none, and which these are."""
    ropes = [block.mixer.rope for block in config.blocks]
    rope = next((rope for rope in ropes if rope is not None), RopeConfig())
    turning = {block: block.with_mixer(rope=block.mixer.rope or rope) for block in dict.fromkeys(config.blocks)}
    return config.replace(blocks=tuple(turning[block] for block in config.blocks)), [rope is None for rope in ropes]
