"""Layers that do not rotate, in models whose layers are alike but for that and their windows.

Such a model is read and written as one whose layers all rotate; which ones do not is told apart from that.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamjax.models.config import ModelConfig, RopeConfig


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
