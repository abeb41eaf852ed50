"""Mixtures of experts in a `config.json`, and models whose layers differ in their MLPs alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from streamjax.models.config import DenseConfig, ExpertsConfig, MLPConfig, ModelConfig, UniformConfig
from streamjax.models.config.dense import Activation
from streamjax.models.families.config_fields import Fields


def read_experts(
    fields: Fields,
    *,
    count: int,
    each: int,
    width: str,
    normalize: bool,
    activation: Activation,
    counts: Sequence[str] = ("num_experts", "num_local_experts"),
) -> ExpertsConfig:
    """Experts of equal width; how many there are is called `num_local_experts`, or `num_experts` in older files.

    Args:
      fields: the config.
      count: experts where the config is silent.
      each: experts of a token where the config is silent.
      width: the field that holds an expert's width.
      normalize: whether a token's weights sum to 1.
      activation: of an expert.
      counts: the fields that may say how many there are.

    Raises:
      ValueError: a field that makes no sense, or two that contradict each other.
    """
    named = {fields.integer(name) for name in counts if fields.get(name, int, None) is not None} or {count}
    if len(named) > 1:
        raise ValueError(f"fields {' and '.join(map(repr, counts))} contradict each other")
    return ExpertsConfig(
        num_experts=named.pop(),
        experts_per_token=fields.integer("num_experts_per_tok", each),
        mlp_dim=fields.integer(width),
        activation=activation,
        normalize_weights=normalize,
    )


def with_mlps(config: UniformConfig, mlps: Sequence[MLPConfig]) -> ModelConfig:
    """A model with an MLP of its own in each layer."""
    model = config.expand()
    pairs = zip(model.blocks, mlps, strict=True)
    return model.replace(blocks=tuple(dataclasses.replace(block, mlp=mlp) for block, mlp in pairs))


def the_experts(config: ModelConfig) -> ExpertsConfig:
    """The experts of a model's layers, some of which may have none.

    Raises:
      ValueError: there are none, or two kinds.
    """
    kinds = list(dict.fromkeys(block.mlp for block in config.blocks if isinstance(block.mlp, ExpertsConfig)))
    if len(kinds) != 1:
        raise ValueError("a mixture of experts that is the same in all layers which have one is needed")
    return kinds[0]


def without_experts(config: ModelConfig) -> tuple[UniformConfig, ExpertsConfig, list[bool]]:
    """The model with dense MLPs in all layers, in its flat form; its experts; and which layers have them.

    The width of the MLPs is that of its dense layers; where it has none, of an expert.

    Raises:
      ValueError: it has no experts, or experts of two kinds, or layers that differ in more than experts and windows.
    """
    experts = the_experts(config)
    sparse = [isinstance(block.mlp, ExpertsConfig) for block in config.blocks]
    width = next((block.mlp.mlp_dim for block in config.blocks if isinstance(block.mlp, DenseConfig)), experts.mlp_dim)
    mlp = DenseConfig(width, activation=experts.activation)
    blocks = tuple(
        dataclasses.replace(block, mlp=mlp) if one else block for block, one in zip(config.blocks, sparse, strict=True)
    )
    return UniformConfig.from_model_config(config.replace(blocks=blocks)), experts, sparse
