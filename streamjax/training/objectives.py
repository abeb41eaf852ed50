"""What a training step minimises: a function of a few numbers a token, so that logits need never exist all at once.

Every objective here reads of the logits only `TokenStats`: the target's log-probability, the log-sum-exp and the mean
of the logits. Whoever makes the logits makes them for one chunk of a sequence at a time, forwards and backwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

Batch = Mapping[str, Array]


class TokenStats(NamedTuple):
    """What is kept of the logits of each token: natural units, float32 (float64 for a float64 model).

    logp: log-probability of the target. lse: log-sum-exp of the logits. mean_logit: their mean over the vocabulary.
    """

    logp: Float[Array, "B C"]
    lse: Float[Array, "B C"]
    mean_logit: Float[Array, "B C"]


def token_stats(logits: Float[Array, "B C V"], targets: Int32[Array, "B C"]) -> TokenStats:
    """The statistics of logits that are all there."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    lse = jax.nn.logsumexp(logits, axis=-1)
    return TokenStats(chosen - lse, lse, jnp.mean(logits, axis=-1))


class Objective:
    """Base of the objectives: frozen dataclasses, static under `jax.jit`.

    A loss is a sum over groups of `rows` consecutive rows of the batch; if `separable`, over the tokens of a row too.
    Then `loss` is also called with chunks of `prepare`'s arrays [B, T], cut along T and padded with zeros, which must
    add nothing.
    """

    arrays: ClassVar[tuple[str, ...]] = ("tokens", "targets", "weights")  # what a batch must hold
    separable: ClassVar[bool] = True
    rows: ClassVar[int] = 1

    def check(self, batch: Mapping[str, np.ndarray | Array], vocab_size: int) -> None:
        """Raise a ValueError, one line, for a batch that makes no sense. Values are looked at where they are known."""
        missing = [name for name in self.arrays if name not in batch]
        if missing:
            raise ValueError(f"the batch has no {missing[0]!r}; it needs {', '.join(self.arrays)}")
        shape = batch["tokens"].shape
        for name in ("tokens", "targets", "weights"):
            if name in self.arrays and batch[name].shape != shape:
                raise ValueError(f"{name} is {list(batch[name].shape)}, tokens {list(shape)}: they must agree")
        if shape[0] % self.rows:
            raise ValueError(f"the batch has {shape[0]} rows; {type(self).__name__} needs a multiple of {self.rows}")

    def prepare(self, batch: Batch) -> dict[str, Array]:
        """The arrays that `loss` reads, `targets` among them, all ids in the vocabulary; for the whole batch."""
        raise NotImplementedError

    def loss(self, stats: TokenStats, prepared: Batch) -> Float[Array, ""]:
        """The loss, or its part of the given rows and tokens."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Objective):
    """Weighted mean of the tokens' negative log-likelihoods, in nats.

    Attributes:
      label_smoothing: the share of the target's probability that is spread evenly over the vocabulary (1512.00567).
      z_loss: factor on the squared log-sum-exp, which keeps logits near 0 (2204.02311, section 5).
      ignore_index: tokens with this target do not count; nor do those of weight 0, whatever their target.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"CrossEntropy.label_smoothing is {self.label_smoothing}: use 0 up to, not including, 1")
        if self.z_loss < 0.0:
            raise ValueError(f"CrossEntropy.z_loss is {self.z_loss}: it must not be negative")

    def check(self, batch: Mapping[str, np.ndarray | Array], vocab_size: int) -> None:
        super().check(batch, vocab_size)
        if any(isinstance(batch[name], jax.core.Tracer) for name in ("targets", "weights")):
            return
        targets, weights = np.asarray(batch["targets"]), np.asarray(batch["weights"])
        counted = (weights != 0) & (targets != self.ignore_index)
        if not counted.any():
            raise ValueError("no token of the batch counts: all weights are 0 or all targets are ignored")
        require_ids(targets, counted, vocab_size)

    def prepare(self, batch: Batch) -> dict[str, Array]:
        counted = (batch["weights"] != 0) & (batch["targets"] != self.ignore_index)
        weights = jnp.where(counted, batch["weights"], 0.0)
        total = jnp.sum(weights)
        weights = weights / jnp.where(total > 0, total, 1.0)
        return {"targets": jnp.where(counted, batch["targets"], 0), "weights": weights}

    def loss(self, stats: TokenStats, prepared: Batch) -> Float[Array, ""]:
        nll = -stats.logp
        if self.label_smoothing:
            uniform = stats.lse - stats.mean_logit
            nll = (1.0 - self.label_smoothing) * nll + self.label_smoothing * uniform
        if self.z_loss:
            nll = nll + self.z_loss * jnp.square(stats.lse)
        weights = prepared["weights"].astype(nll.dtype)
        return jnp.sum(jnp.where(weights == 0, 0.0, nll * weights))


@dataclasses.dataclass(frozen=True)
class Linear(Objective):
    """A given linear function of the statistics: what stands for an objective that is not separable, once its slopes
    are known.
    """

    @staticmethod
    def prepared(targets: Int32[Array, "B T"], slopes: TokenStats) -> dict[str, Array]:
        """Arrays for the function with these slopes."""
        return {"targets": targets, **slopes._asdict()}

    def loss(self, stats: TokenStats, prepared: Batch) -> Float[Array, ""]:
        parts = (jnp.sum(x * prepared[name]) for name, x in stats._asdict().items())
        return sum(parts, jnp.zeros((), stats.logp.dtype))


def require_ids(ids: np.ndarray, counted: np.ndarray, vocab_size: int) -> None:
    """Raise a ValueError for the first counted id outside the vocabulary."""
    bad = counted & ((ids < 0) | (ids >= vocab_size))
    if bad.any():
        row, place = np.argwhere(bad)[0]
        raise ValueError(f"target {ids[row, place]} at row {row}, token {place}: the vocabulary has {vocab_size} ids")
