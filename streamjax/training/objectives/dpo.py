"""Direct preference optimisation (2305.18290): of two answers, make the chosen one likelier than the rejected one.

How much likelier is measured against a reference model, whose log-probabilities come with the batch: a function of its
own computes them once (`token_log_probs`), so that training holds one model only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from streamjax.field_checks import Interval, Positive, check_fields
from streamjax.training.objectives.objective import Batch, Objective, TokenStats, is_known, require_targets, shares


@dataclasses.dataclass(frozen=True)
class DPO(Objective):
    """Mean over pairs of -log sigmoid(beta * (how much the chosen row gained - how much the rejected one did)).

    Rows 2 i and 2 i + 1 of a batch are the chosen and the rejected answer of pair i. Weights are 1 for tokens of the
    answer, 0 for the prompt and padding. `reference_logp`, [B], is the weighted sum of a row's log-probabilities under
    the reference: `jnp.sum(batch["weights"] * token_log_probs(reference, batch), axis=1)`. A pair without tokens that
    count in both rows is left out.

    Attributes:
      beta: how strongly the model is held to the reference; the paper's 0.1.
      label_smoothing: the probability that the two answers of a pair are swapped (conservative DPO,
        https://ericmitchell.ai/cdpo.pdf).
      length_normalised: compare means over a row's tokens in the place of sums, with the reference's means (2405.14734
        has the reason; there without a reference).
    """

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Interval(0, 0.5, below=True)] = 0.0
    length_normalised: bool = False
    row_arrays: ClassVar[tuple[str, ...]] = ("reference_logp",)
    separable: ClassVar[bool] = False
    rows: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, batch: Mapping[str, np.ndarray | Array], vocab_size: int) -> None:
        super().check(batch, vocab_size)
        require_targets(batch, vocab_size)
        if is_known(batch["weights"]) and not np.any(_complete(np.asarray(batch["weights"]))):
            raise ValueError("no pair of the batch counts: in each of them a row has no token of weight above 0")

    def count(self, batch: Batch) -> Float[Array, ""]:
        """The number of pairs that count."""
        return jnp.sum(_complete(batch["weights"])) / 2.0

    def prepare(self, batch: Batch) -> dict[str, Array]:
        weights = batch["weights"]
        return {
            "targets": jnp.where(weights == 0, 0, batch["targets"]),
            "weights": weights,
            "reference_logp": batch["reference_logp"],
            "pair_shares": shares(jnp.asarray(_complete(weights), float)) * 2.0,
        }

    def counted(self, prepared: Batch) -> Bool[Array, "B T"]:
        return (prepared["weights"] != 0) & (prepared["pair_shares"] != 0)[:, None]

    def loss(self, stats: TokenStats, prepared: Batch) -> Float[Array, ""]:
        dtype = stats.logp.dtype
        weights = prepared["weights"].astype(dtype)
        gained = jnp.sum(jnp.where(weights == 0, 0.0, weights * stats.logp), axis=1)
        gained = gained - prepared["reference_logp"].astype(dtype)
        if self.length_normalised:
            total = jnp.sum(weights, axis=1)
            gained = gained / jnp.where(total > 0, total, 1.0)
        margin = self.beta * (gained[0::2] - gained[1::2])
        swapped = self.label_smoothing
        loss = -(1.0 - swapped) * jax.nn.log_sigmoid(margin) - swapped * jax.nn.log_sigmoid(-margin)
        return jnp.sum(loss * prepared["pair_shares"][0::2].astype(dtype))


def _complete(weights: Float[Array | np.ndarray, "B T"]) -> Bool[Array | np.ndarray, " B"]:
    """Rows of pairs of which both rows have tokens that count."""
    return (weights > 0).any(axis=1).reshape(-1, 2).all(axis=1).repeat(2)
