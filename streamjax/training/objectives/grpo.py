"""Group relative policy optimisation (DeepSeekMath, 2402.03300), and the variants that later work settled on.

Several answers to one prompt are a group. An answer's advantage is how much better than its group it was rewarded; its
tokens become likelier or less likely by a clipped ratio, as in PPO (1707.06347), and a penalty holds the model to a
reference. Answers come with the log-probabilities under the model that wrote them, and those under the reference;
`token_log_probs` computes both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from streamjax.field_checks import Fraction, NotNegative, Size, check_fields
from streamjax.training.objectives.objective import (
    Batch,
    Objective,
    TokenStats,
    require_arrays,
    require_targets,
    shares,
    wide,
)


def group_advantages(
    rewards: Float[Array | np.ndarray, " B"], group_size: int, *, scaled: bool = True, epsilon: float = 1e-4
) -> Float[Array, " B"]:
    """Rewards less their group's mean, in units of its standard deviation (2402.03300, section 4.1.2).

    Args:
      rewards: of the answers of a batch; each `group_size` consecutive ones are a group.
      group_size: answers to one prompt, at least 2.
      scaled: divide by the standard deviation; False is Dr. GRPO (2503.20783, section 3.2).
      epsilon: added to it, for groups whose rewards are all the same.

    Raises:
      ValueError: rewards that are not whole groups.
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: an answer is compared with others, use 2 or more")
    if rewards.shape[0] % group_size:
        raise ValueError(f"{rewards.shape[0]} rewards are no whole groups of {group_size}")
    groups = jnp.asarray(rewards).reshape(-1, group_size)
    above = groups - jnp.mean(groups, axis=1, keepdims=True)
    if scaled:
        above = above / (jnp.std(groups, axis=1, keepdims=True) + epsilon)
    return above.reshape(-1)


@dataclasses.dataclass(frozen=True)
class GRPO(Objective):
    """Minus the mean over tokens of min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), plus a penalty.

    r is a token's probability over that under the model that wrote it, A its row's advantage. A batch holds
    `advantages`, [B] (`group_advantages`), and weights, 1 for the answer's tokens and 0 for the prompt and padding;
    `old_logp`, [B, T], log-probabilities under the model that wrote the answers, where that is not the model as it is
    now; `reference_logp`, [B, T], those under the reference, where there is a penalty.

    Attributes:
      clip_low, clip_high: how far a ratio may go below and above 1; 0.2 each in the paper, 0.28 above in DAPO
        (2503.14476, section 3.1).
      kl: factor on the estimate exp(d) - d - 1 of the divergence from the reference, d = reference_logp - logp; the
        paper's 0.04, 0 in DAPO.
      normalisation: "sequence" is the mean over rows of the means over their tokens (the paper); "token" the mean over
        all tokens of the batch (DAPO, section 3.3); "constant" the mean over rows of sums divided by `max_tokens`
        (Dr. GRPO, 2503.20783, section 3.2).
      max_tokens: the longest answer there may be, for "constant".
    """

    clip_low: Fraction = 0.2
    clip_high: NotNegative = 0.2
    kl: NotNegative = 0.04
    normalisation: Literal["sequence", "token", "constant"] = "sequence"
    max_tokens: Size | None = None
    row_arrays: ClassVar[tuple[str, ...]] = ("advantages",)

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.normalisation == "constant") != (self.max_tokens is not None):
            raise ValueError(
                f"GRPO.max_tokens is {self.max_tokens} with normalisation {self.normalisation!r}: "
                'set it, to 1 or more, for "constant" and for nothing else'
            )

    def check(self, batch: Mapping[str, np.ndarray | Array], vocab_size: int) -> None:
        super().check(batch, vocab_size)
        if self.kl and "reference_logp" not in batch:
            raise ValueError(f"the batch has no 'reference_logp', which GRPO.kl = {self.kl} needs; without it set kl=0")
        require_arrays(batch, tuple(name for name in ("tokens", "old_logp", "reference_logp") if name in batch))
        require_targets(batch, vocab_size)

    def count(self, batch: Batch) -> Float[Array, ""]:
        """The number of rows; with "token" the sum of the weights."""
        weights = wide(batch["weights"])
        return jnp.sum(weights) if self.normalisation == "token" else jnp.asarray(weights.shape[0], weights.dtype)

    def prepare(self, batch: Batch) -> dict[str, Array]:
        weights = wide(batch["weights"])
        rows = weights.shape[0]
        if self.normalisation == "token":
            share = shares(weights)
        elif self.normalisation == "sequence":
            total = jnp.sum(weights, axis=1, keepdims=True)
            share = weights / jnp.where(total > 0, total, 1.0) / rows
        else:
            share = weights / (rows * (self.max_tokens or 1))
        advantages = batch["advantages"][:, None]
        arrays = {
            "targets": jnp.where(weights == 0, 0, batch["targets"]),
            "shares": share,
            "advantages": jnp.broadcast_to(advantages, weights.shape),
        }
        used = ("old_logp", "reference_logp") if self.kl else ("old_logp",)
        return arrays | {name: batch[name] for name in used if name in batch}

    def counted(self, prepared: Batch) -> Bool[Array, "B T"]:
        """Without a penalty an answer that was rewarded as its group was teaches nothing."""
        taught = prepared["shares"] != 0
        return taught if self.kl else taught & (prepared["advantages"] != 0)

    def loss(self, stats: TokenStats, prepared: Batch) -> Float[Array, ""]:
        dtype = stats.logp.dtype
        share = prepared["shares"].astype(dtype)

        def counted(x: Array) -> Array:
            # Before anything is exponentiated: what an ignored token holds may overflow, and its gradient is then NaN.
            return jnp.where(share == 0, 0.0, x.astype(dtype))

        logp, advantages = counted(stats.logp), counted(prepared["advantages"])
        old = counted(prepared["old_logp"]) if "old_logp" in prepared else jax.lax.stop_gradient(logp)
        ratio = jnp.exp(logp - old)
        clipped = jnp.clip(ratio, 1.0 - self.clip_low, 1.0 + self.clip_high)
        loss = -jnp.minimum(ratio * advantages, clipped * advantages)
        if self.kl:
            gap = counted(prepared["reference_logp"]) - logp
            loss = loss + self.kl * (jnp.expm1(gap) - gap)
        return jnp.sum(loss * share)
