"""Decoder models and the Hugging Face checkpoints that they load."""

from streamjax.models.config import LayerSpec, ModelConfig, RopeConfig
from streamjax.models.decoder import Block, Decoder, default_dtype, forward
from streamjax.models.layout import stack_layers, unstack_layers

__all__ = [
    "Block",
    "Decoder",
    "LayerSpec",
    "ModelConfig",
    "RopeConfig",
    "default_dtype",
    "forward",
    "stack_layers",
    "unstack_layers",
]
