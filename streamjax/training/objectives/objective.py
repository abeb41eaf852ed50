"""What a training step minimises: a function of a few numbers a token, so that logits need never exist all at once.

Every objective here reads of the logits only `TokenStats`: the target's log-probability, the log-sum-exp and the mean
of the logits. Whoever makes the logits makes them for one chunk of a sequence at a time, forwards and backwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from streamjax.field_checks import BelowOne, Interval, NotNegative, check_fields

Batch = Mapping[str, Array]


class TokenStats(NamedTuple):
    """What is kept of the logits of each token: natural units, float32 (float64 for a float64 model).

    logp: log-probability of the target, or of each of a token's N targets. lse: log-sum-exp of the logits. mean_logit:
    their mean over the vocabulary.
    """

    logp: Float[Array, "B C"] | Float[Array, "B C N"]
    lse: Float[Array, "B C"]
    mean_logit: Float[Array, "B C"]


def token_stats(logits: Float[Array, "B C V"], targets: Int32[Array, "B C"] | Int32[Array, "B C N"]) -> TokenStats:
    """The statistics of logits that are all there."""
    several = targets.ndim == 3
    chosen = jnp.take_along_axis(logits, targets if several else targets[..., None], axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    logp = chosen - lse[..., None]
    return TokenStats(logp if several else logp[..., 0], lse, jnp.mean(logits, axis=-1))


class Objective:
    """Base of the objectives: frozen dataclasses, static under `jax.jit`.

    A loss is a sum over groups of `rows` consecutive rows of the batch; if `separable`, over the tokens of a row too.
    Then `loss` is also called with chunks of `prepare`'s arrays [B, T], cut along T and padded with zeros, which must
    add nothing. Every array of `prepare` has the batch's rows as its first dimension.
    """

    arrays: ClassVar[tuple[str, ...]] = ("tokens", "targets", "weights")  # what a batch must hold, [B, T]
    row_arrays: ClassVar[tuple[str, ...]] = ()  # and what more, [B]
    separable: ClassVar[bool] = True
    rows: ClassVar[int] = 1

    def check(self, batch: Mapping[str, np.ndarray | Array], vocab_size: int) -> None:
        """Raise a ValueError, one line, for a batch that makes no sense. Values are looked at where they are known."""
        require_arrays(batch, self.arrays, self.row_arrays)
        rows = batch["tokens"].shape[0]
        if rows % self.rows:
            raise ValueError(f"the batch has {rows} rows; {type(self).__name__} needs a multiple of {self.rows}")

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Of how many tokens, or rows, the loss is a mean: how much a batch counts among others."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> dict[str, Array]:
        """The arrays that `loss` reads, for the whole batch.

        `targets` is among them, all ids in the vocabulary, [B, T]; or [B, T, N] where N logits of a token are read.
        """
        raise NotImplementedError

    def counted(self, prepared: Batch) -> Bool[Array, "B T"] | None:
        """Which tokens the loss depends on: of others no logits are made, and `loss` reads zeros; None: all.

        Of a separable objective that says so, `loss` is called with any tokens of any rows, [1, N].
        """
        return None

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

    label_smoothing: BelowOne = 0.0
    z_loss: NotNegative = 0.0
    ignore_index: Annotated[int, Interval(-(2**31), 2**31 - 1)] = -100

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, batch: Mapping[str, np.ndarray | Array], vocab_size: int) -> None:
        super().check(batch, vocab_size)
        require_targets(batch, vocab_size, self.ignore_index)

    def count(self, batch: Batch) -> Float[Array, ""]:
        return jnp.sum(self._weights(batch))

    def _weights(self, batch: Batch) -> Float[Array, "B T"]:
        return jnp.where(batch["targets"] == self.ignore_index, 0.0, wide(batch["weights"]))

    def prepare(self, batch: Batch) -> dict[str, Array]:
        weights = self._weights(batch)
        return {"targets": jnp.where(weights == 0, 0, batch["targets"]), "weights": shares(weights)}

    def counted(self, prepared: Batch) -> Bool[Array, "B T"]:
        return prepared["weights"] != 0

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
    def prepared(targets: Int32[Array, "*chunk B T"], slopes: TokenStats) -> dict[str, Array]:
        """Arrays for the function with these slopes."""
        return {"targets": targets, **slopes._asdict()}

    def counted(self, prepared: Batch) -> Bool[Array, "B T"]:
        slopes = [prepared[name] != 0 for name in TokenStats._fields]
        return jnp.any(slopes[0], axis=tuple(range(2, slopes[0].ndim))) | slopes[1] | slopes[2]

    def loss(self, stats: TokenStats, prepared: Batch) -> Float[Array, ""]:
        parts = (jnp.sum(x * prepared[name]) for name, x in stats._asdict().items())
        return sum(parts, jnp.zeros((), stats.logp.dtype))


def wide(weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """Weights in the widest dtype that JAX has enabled: what they are divided by is then known well enough."""
    return jnp.asarray(weights).astype(float)


def shares(weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """Weights divided by their sum, as `wide` ones; zeros where that is 0."""
    weights = wide(weights)
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, 1.0)


def require_arrays(
    batch: Mapping[str, np.ndarray | Array], arrays: tuple[str, ...], row_arrays: tuple[str, ...] = ()
) -> None:
    """Raise a ValueError for an array that is missing, or has not one value a token, or one a row."""
    names = arrays + row_arrays
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(f"the batch has no {missing[0]!r}; it needs {', '.join(names)}")
    shape = batch["tokens"].shape
    for name in names:
        found, wanted = batch[name].shape, shape if name in arrays else shape[:1]
        if found != wanted:
            raise ValueError(f"{name} is {list(found)}, tokens {list(shape)}: {name} must be {list(wanted)}")


def require_no_prefix(batch: Mapping[str, np.ndarray | Array]) -> None:
    """Raise a ValueError for a batch whose rows begin with prefixes that layers would have to look at first."""
    if "prefix" in batch:
        raise ValueError("the batch has prefixes, which only sj.training.loss_and_grad looks at: leave prefix out")


def is_known(x: np.ndarray | Array) -> bool:
    """Whether an array's values can be looked at: not under `jax.jit`, nor where other processes hold parts of it."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def require_targets(batch: Mapping[str, np.ndarray | Array], vocab_size: int, ignore_index: int | None = None) -> None:
    """Raise a ValueError if no token counts, or one whose target is not in the vocabulary. Unknown values pass."""
    if not all(is_known(batch[name]) for name in ("targets", "weights")):
        return
    targets, weights = np.asarray(batch["targets"]), np.asarray(batch["weights"])
    counted = weights != 0 if ignore_index is None else (weights != 0) & (targets != ignore_index)
    if not counted.any():
        raise ValueError("no token of the batch counts: all weights are 0 or all targets are ignored")
    bad = counted & ((targets < 0) | (targets >= vocab_size))
    if bad.any():
        row, place = np.argwhere(bad)[0]
        raise ValueError(
            f"target {targets[row, place]} at row {row}, token {place}: the vocabulary has {vocab_size} ids"
        )
