"""Decoder models and the Hugging Face checkpoints that they load."""

from streamjax.models.block import Block
from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    HSAConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
    UniformConfig,
)
from streamjax.models.decoder import Decoder, default_dtype, forward
from streamjax.models.layer_stacking import stack_layers, unstack_layers
from streamjax.models.lora.adapters import LoRAParam
from streamjax.models.lora.attaching import add_lora, merge_lora

__all__ = [
    "AttentionConfig",
    "Block",
    "BlockConfig",
    "Decoder",
    "DenseConfig",
    "HSAConfig",
    "LoRAParam",
    "ModelConfig",
    "NormConfig",
    "RopeConfig",
    "UniformConfig",
    "add_lora",
    "default_dtype",
    "forward",
    "merge_lora",
    "stack_layers",
    "unstack_layers",
]
