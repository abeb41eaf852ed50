"""Distillation (1503.02531): a student learns what a teacher makes of a text, and not only the text.

A teacher's prediction of a token is handed over as its `top_k` likeliest tokens and one number for all others, which a
feed puts into the batch (`training/distillation/teacher.py`). So the student's logits need not all exist at once, nor
the teacher's beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from streamjax.field_checks import Fraction, Size, check_fields
from streamjax.training.objectives.objective import Batch, Objective, TokenStats, require_targets, shares, wide

SMALL = 1e-6  # a probability of all other tokens below this is rounding


@dataclasses.dataclass(frozen=True)
class Distillation(Objective):
    """What a student takes from its teacher.

    With "predictions" the mean over tokens of the divergence KL(teacher || student) in nats, over the teacher's `top_k`
    tokens and all others as one: a lower bound of the divergence over the vocabulary, and equal to it with all tokens.
    A batch has `teacher_ids`, int32, and `teacher_logp`, float32 [B, T, top_k], besides `tokens`, `targets` and
    `weights`.

    With "layers" the converted layers, each by itself: what its token mixer makes of the teacher's input to the layer
    is to be what the teacher's makes of it (MOHAWK's second stage, 2408.10189; LoLCATs, 2410.10254). The loss is the
    mean over layers of the squared error as a share of the teacher's square; see `alignment_loss_and_grad`.

    Attributes:
      matches: "layers" or "predictions".
      top_k: how many of the teacher's tokens are handed over.
      cross_entropy: the share of the loss that is the text's own cross-entropy; with "predictions".
    """

    matches: Literal["layers", "predictions"] = "predictions"
    top_k: Size = 64
    cross_entropy: Fraction = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.matches == "layers" and self.cross_entropy:
            raise ValueError(
                f'Distillation.cross_entropy is {self.cross_entropy}: with matches="layers" no prediction is made, '
                "leave it at 0"
            )

    def check(self, batch: Mapping[str, np.ndarray | Array], vocab_size: int) -> None:
        super().check(batch, vocab_size)
        require_targets(batch, vocab_size)
        shape = batch["tokens"].shape
        for name in ("teacher_ids", "teacher_logp"):
            if name not in batch:
                raise ValueError(f"the batch has no {name!r}: a teacher's predictions, [B, T, {self.top_k}]")
            if batch[name].shape != (*shape, self.top_k):
                found = list(batch[name].shape)
                raise ValueError(f"{name} is {found}, tokens {list(shape)}: {name} must be {[*shape, self.top_k]}")

    def count(self, batch: Batch) -> Float[Array, ""]:
        return jnp.sum(wide(batch["weights"]))

    def prepare(self, batch: Batch) -> dict[str, Array]:
        counted = batch["weights"] != 0
        targets = jnp.where(counted, batch["targets"], 0)[..., None]
        ids = jnp.where(counted[..., None], batch["teacher_ids"], 0)
        return {
            "targets": jnp.concatenate((targets, ids), axis=-1),
            "weights": shares(batch["weights"]),
            "teacher_logp": batch["teacher_logp"],
        }

    def counted(self, prepared: Batch) -> Bool[Array, "B T"]:
        return prepared["weights"] != 0

    def loss(self, stats: TokenStats, prepared: Batch) -> Float[Array, ""]:
        dtype, weights = stats.logp.dtype, prepared["weights"]
        loss = divergence(prepared["teacher_logp"].astype(dtype), stats.logp[..., 1:])
        if self.cross_entropy:
            loss = (1.0 - self.cross_entropy) * loss - self.cross_entropy * stats.logp[..., 0]
        return jnp.sum(jnp.where(weights == 0, 0.0, loss * weights.astype(dtype)))


def divergence(teacher: Float[Array, "B C N"], student: Float[Array, "B C N"]) -> Float[Array, "B C"]:
    """KL(teacher || student) in nats, from log-probabilities of N tokens, all others counting as one."""
    named = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    rest, mine = (1.0 - jnp.sum(jnp.exp(logp), axis=-1) for logp in (teacher, student))
    other = rest * (jnp.log(jnp.maximum(rest, SMALL)) - jnp.log(jnp.maximum(mine, SMALL)))
    return named + jnp.where(rest > SMALL, other, 0.0)
