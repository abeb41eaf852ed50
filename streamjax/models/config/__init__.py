"""What a decoder is: frozen, hashable descriptions that hold shapes and choices, never arrays.

`ModelConfig` (`model.py`) is a list of `BlockConfig`s (`block.py`); a block has a token mixer (`attention.py`,
`latent.py`, `recurrent.py`) and an MLP (`dense.py`, `experts.py`). `UniformConfig` (`uniform.py`) is the flat form of a
model with equal layers. `families` makes one from a Hugging Face `config.json`; `decoder.py` builds the model that it
describes.
"""

from typing import Any

from streamjax.field_checks import from_plain
from streamjax.models.config.attention import AttentionConfig, TemperatureConfig
from streamjax.models.config.block import AttentionMixerConfig, BlockConfig, LayerInputConfig, MixerConfig, MLPConfig
from streamjax.models.config.dense import DenseConfig
from streamjax.models.config.elementwise import HGRNConfig, RGLRUConfig
from streamjax.models.config.experts import DenseAndExpertsConfig, ExpertsConfig
from streamjax.models.config.gated_linear import ChannelMixConfig, GatedLinearConfig, HGRN2Config, RWKV7Config
from streamjax.models.config.hierarchical import HSAConfig
from streamjax.models.config.latent import LatentAttentionConfig
from streamjax.models.config.memory_mixers import (
    ConvEmbeddingConfig,
    LMUConfig,
    MoMConfig,
    PrefixLinearConfig,
    SpikingMixConfig,
)
from streamjax.models.config.model import ModelConfig
from streamjax.models.config.norm import NormConfig
from streamjax.models.config.recurrent import GatedConvConfig, GatedDeltaConfig, GMUConfig, KimiDeltaConfig, SSDConfig
from streamjax.models.config.rope import RopeConfig, RopeKind
from streamjax.models.config.uniform import UniformConfig

__all__ = [
    "AttentionConfig",
    "AttentionMixerConfig",
    "BlockConfig",
    "ChannelMixConfig",
    "ConvEmbeddingConfig",
    "DenseAndExpertsConfig",
    "DenseConfig",
    "ExpertsConfig",
    "GMUConfig",
    "GatedConvConfig",
    "GatedDeltaConfig",
    "GatedLinearConfig",
    "HGRN2Config",
    "HGRNConfig",
    "HSAConfig",
    "KimiDeltaConfig",
    "LMUConfig",
    "LatentAttentionConfig",
    "LayerInputConfig",
    "MLPConfig",
    "MixerConfig",
    "MoMConfig",
    "ModelConfig",
    "NormConfig",
    "PrefixLinearConfig",
    "RGLRUConfig",
    "RWKV7Config",
    "RopeConfig",
    "RopeKind",
    "SSDConfig",
    "SpikingMixConfig",
    "TemperatureConfig",
    "UniformConfig",
    "expanded",
    "parse_config",
]


def expanded(config: ModelConfig | UniformConfig) -> ModelConfig:
    """A config as a list of blocks."""
    return config.expand() if isinstance(config, UniformConfig) else config


def parse_config(values: Any) -> ModelConfig:
    """A config that went through JSON, in the form of `ModelConfig.to_json_dict` or the flat one of `UniformConfig`.

    Raises:
      ValueError: it is none; one line that names the field.
    """
    if not isinstance(values, dict):
        raise ValueError(f"ModelConfig is {str(values)[:60]}: it must be an object with its fields")
    if "num_layers" in values:
        return from_plain(UniformConfig, values).expand()
    return ModelConfig.from_json_dict(values)
