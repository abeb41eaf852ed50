"""AdamW (1711.05101) with linear warm-up, cosine decay (1608.03983) to a floor, and clipping by the global norm."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from streamjax.field_checks import BelowOne, Count, Fraction, Interval, NotNegative, Positive, Size, check_fields
from streamjax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How weights follow gradients.

    Attributes:
      learning_rate: at the end of the warm-up.
      final_fraction: of `learning_rate`, left at the last step.
      warmup_steps: steps of linear warm-up, from 0.
      weight_decay: decoupled; norms and biases are not decayed.
      b1, b2, eps: Adam's.
      clip_norm: largest global norm of a gradient; None does not clip.
      accumulation: microbatches that a batch is cut into, one after the other in memory.
      skip_nonfinite: so many steps in a row may have a loss or a gradient that is not finite, or a spike. They leave
        the weights as they are; one more ends the run. With 0 the first that is not finite ends it.
      spike_factor: a gradient whose norm is more than so many times the running mean of earlier ones is a spike; None:
        no gradient is.
    """

    learning_rate: Positive = 1e-3
    final_fraction: Fraction = 0.1
    warmup_steps: Count = 100
    weight_decay: NotNegative = 0.1
    b1: BelowOne = 0.9
    b2: BelowOne = 0.95
    eps: Positive = 1e-8
    clip_norm: Positive | None = 1.0
    accumulation: Size = 1
    skip_nonfinite: Count = 0
    spike_factor: Annotated[float, Interval(1, above=True)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.spike_factor is not None and not self.skip_nonfinite:
            raise ValueError(
                f"optimizer.spike_factor is {self.spike_factor}, and no step may be skipped: set "
                "optimizer.skip_nonfinite to how many in a row may be"
            )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step (from 0) -> learning rate: linear up over the warm-up, a cosine down to the floor at step `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def decay_mask(model: Decoder) -> Decoder:
    """True for the parameters that weight decay shrinks: not for norms, biases and other vectors."""

    def decayed(path: tuple, param: nnx.Variable) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return len(param.axes) > 1 and "norm" not in name and "bias" not in name

    flat, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return jax.tree.unflatten(jax.tree.structure(model), [decayed(path, param) for path, param in flat])


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """Scale gradients to a global norm of at most `largest`.

    `optax.clip_by_global_norm` divides each number by the norm, which XLA for CPUs does not do twice: it writes the
    divided gradients out for AdamW's two moments, a copy of all of them. A product is done where it is needed.
    """

    def update(grads: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        norm = optax.tree.norm(grads)
        factor = jnp.where(norm > largest, largest / norm, 1.0)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps."""
    clip = optax.identity() if config.clip_norm is None else clip_by_norm(config.clip_norm)
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(clip, adamw)
