"""How many tokens the losses of routers are means over: a batch's, which a layer that sees a chunk cannot know."""

from __future__ import annotations

from typing import TypeVar

import jax

from streamjax.models.config import ExpertsConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mlps.experts import Experts

Model = TypeVar("Model", bound=Decoder)


def with_routing_total(model: Model, tokens: int | None) -> Model:
    """A model, or a tree shaped as one, whose routers' losses are means over `tokens` tokens; None: of each call."""
    experts = (block.mlp for block in model.config.blocks if isinstance(block.mlp, ExpertsConfig))
    if not any(mlp.balance_loss or mlp.z_loss for mlp in experts):
        return model
    leaves, structure = jax.tree.flatten(model)
    copy: Model = jax.tree.unflatten(structure, leaves)
    for block in (*copy.stack, *copy.layers):
        if isinstance(block.mlp, Experts):
            block.mlp.routing_total = tokens
    return copy
