"""What a router did with the tokens of a batch, told as a gradient.

A router runs deep inside a model, and in chunked backprop several times for a token. So what it did leaves the model as
gradients do: as that of `RoutingReport`, an array of zeros that is attached for the time of a training step. What makes
it is an identity on what the experts return, when the backward pass comes by. A token counts if its cotangent is not
zero: padding, and tokens on which the loss does not depend, do not.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class RoutingReport(nnx.Variable):
    """A place for the numbers of a `Report`, float32; no weight."""


class Report(NamedTuple):
    """Sums over tokens.

    choices: tokens that each expert was chosen for. probabilities: of each expert. squares: squared log-sum-exp of the
    router's logits. tokens: how many there are.
    """

    choices: Float[Array, " X"]
    probabilities: Float[Array, " X"]
    squares: Float[Array, ""]
    tokens: Float[Array, ""]

    @staticmethod
    def size(experts: int) -> int:
        """Numbers of a report on so many experts."""
        return 2 * experts + 2

    @classmethod
    def from_array(cls, report: Float[Array, " S"]) -> Report:
        """The numbers of a `RoutingReport` by name."""
        experts = report.shape[0] // 2 - 1
        return cls(report[:experts], report[experts:-2], report[-2], report[-1])

    @property
    def load(self) -> Float[Array, ""]:
        """Choices of the busiest expert over those of the mean one; 0 of no tokens."""
        return jnp.max(self.choices) * len(self.choices) / jnp.maximum(1, jnp.sum(self.choices))

    @property
    def balance_loss(self) -> Float[Array, ""]:
        """The Switch Transformer's loss (2101.03961)."""
        share = self.choices / jnp.maximum(1, jnp.sum(self.choices))
        return len(share) * jnp.sum(share * self.probabilities) / jnp.maximum(1, self.tokens)

    @property
    def z_loss(self) -> Float[Array, ""]:
        """The router's z-loss (2202.08906)."""
        return self.squares / jnp.maximum(1, self.tokens)


@jax.custom_vjp
def with_report(
    y: Float[Array, "B T E"], report: Float[Array, " S"], logits: Float[Array, "B T X"], experts: Int[Array, "B T A"]
) -> Float[Array, "B T E"]:
    """`y`; the gradient of `report` is the report.

    Args:
      y: what the experts return.
      report: a place, of any values.
      logits: the router's.
      experts: each token's.
    """
    return y


def _forward(y: Array, report: Array, logits: Array, experts: Array) -> tuple[Array, tuple[Array, Array]]:
    return y, (logits, experts)


def _backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array, None, None]:
    logits, experts = saved
    counted = jnp.any(cotangent != 0, axis=-1).astype(jnp.float32)
    logits = logits.astype(jnp.float32)
    # A comparison that is summed, where a scatter would be gathered on a mesh.
    chosen = jnp.sum(experts[..., None] == jnp.arange(logits.shape[-1]), axis=-2, dtype=jnp.float32)
    sums = [jnp.sum(x * counted[..., None], axis=(0, 1)) for x in (chosen, jax.nn.softmax(logits, axis=-1))]
    squares = jnp.sum(counted * jax.nn.logsumexp(logits, axis=-1) ** 2)
    return cotangent, jnp.concatenate([*sums, jnp.stack([squares, jnp.sum(counted)])]), None, None


with_report.defvjp(_forward, _backward)
