"""Which share of a row's tokens a layer computes while a model is fine-tuned (LeMo, Wang et al., 2501.09767)."""

from __future__ import annotations

import dataclasses

import optax

from streamjax.field_checks import Fraction, Positive, Size, check_fields
from streamjax.training.schedules import warmup_cosine


@dataclasses.dataclass(frozen=True)
class LeMoConfig:
    """With a `share` below 1 each layer computes its most informative blocks of tokens, and the others pass it by.

    Small networks, the predictors, say which blocks these are. A run trains them on its own rows before its first step
    and writes them to `predictors.safetensors` in its workdir, or takes them from the file `predictors`.

    Attributes:
      share: of a row's tokens that layers compute, on the mean over layers; 1.0 computes all, as in any run.
      equal: give every layer the same share, not as many blocks as are above its own threshold. Stacked layers then
        stay one compiled loop.
      block: tokens of a block, which stay or leave together; it divides `data.seq_len`.
      predictors: a file of an earlier run with the same model; None trains them.
      steps: batches on which they are trained.
      updates: steps of Adam on each batch. What the model computes costs most, so a few more cost little.
      learning_rate: their highest; it rises in the first tenth of the updates, and falls to 0.
      width: of their two hidden layers.
      channels: in which a block of queries and a block of keys are multiplied.
    """

    share: Fraction = 1.0
    equal: bool = False
    block: Size = 64
    predictors: str | None = None
    steps: Size = 60
    updates: Size = 4
    learning_rate: Positive = 2e-3
    width: Size = 64
    channels: Size = 16

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.share:
            raise ValueError("LeMoConfig.share is 0: a layer computes some tokens, use a number up to 1")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """What trains the predictors."""
        rate = warmup_cosine(self.learning_rate, self.steps * self.updates)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
