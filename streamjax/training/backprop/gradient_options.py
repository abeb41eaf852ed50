"""The static choices of one gradient computation."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from flax import nnx

from streamjax.attention.context.sequence import Exchange
from streamjax.training.backprop.trainable_parameters import Trainable


@dataclasses.dataclass(frozen=True)
class GradientOptions:
    """See `streamjax.training.loss_and_grad`; here everything is settled."""

    logits_chunk: int
    kv_grad_dtype: Any
    trainable: Trainable = nnx.Param
    grad_dtype: Any = None  # in which gradients of parameters are summed over chunks; None: float32 at least
    segment: int = 1
    offload: Literal["host"] | None = None
    offload_fraction: float = 1.0
    context_exchange: Exchange = "auto"
    keep_attention: bool = False
