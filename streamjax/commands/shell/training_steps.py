"""Steps of commands that train something small beside a frozen model: a bar, Ctrl-C, and an end if a loss is NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from streamjax.commands.shell.progress import progress_bar
from streamjax.commands.shell.runner import Stopped
from streamjax.models.decoder import Decoder
from streamjax.models.nonfinite import NotFiniteError, where_not_finite
from streamjax.training.run.signals import StopSignals


@runtime_checkable
class Step(Protocol):
    """What training gives after each step."""

    @property
    def loss(self) -> float: ...


AnyStep = TypeVar("AnyStep", bound=Step)


class Ran(NamedTuple):
    """The last step, how many of `steps` were done, what was said of it, and the signal that ended them, or 0."""

    step: Any
    done: int
    steps: int
    metrics: str
    received: int

    def __str__(self) -> str:
        return f"step {self.done} of {self.steps}: {self.metrics}"

    def end(self) -> None:
        """Raise `Stopped` where a signal came before the last step; for when all is written."""
        if self.received and self.done < self.steps:
            raise Stopped(128 + self.received)


def no_loss(model: Decoder, step: int) -> NotFiniteError:
    """The error about a loss that is not finite; it says what of the model is not finite either."""
    why = where_not_finite(model)
    return NotFiniteError(f"the loss is not finite at step {step}: nothing is written{'; ' * bool(why)}{why}")


def run_steps(
    model: Decoder,
    trained: Iterable[AnyStep],
    steps: int,
    describe: Callable[[AnyStep], str] = lambda step: f"loss {step.loss:.4f}",
) -> Ran:
    """Run training to its end, or until a signal comes.

    Args:
      model: the frozen model, which is asked where a loss that is not finite comes from.
      trained: one entry a step, `steps` of them, and one at least.
      steps: of the bar.
      describe: what is said of a step.

    Raises:
      NotFiniteError: a loss that is not finite.
    """
    with StopSignals() as stop, progress_bar(total=steps, unit="step") as bar:
        for done, step in enumerate(trained, 1):
            if not math.isfinite(step.loss):
                raise no_loss(model, done)
            metrics = describe(step)
            bar.set_postfix_str(metrics, refresh=False)
            bar.update()
            if stop.received:
                break
    return Ran(step, done, steps, metrics, stop.received or 0)
