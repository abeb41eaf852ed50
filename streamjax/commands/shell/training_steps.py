"""Steps of commands that train something small beside a frozen model: a bar, Ctrl-C, and an end if a loss is NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from streamjax.commands.shell.progress import progress_bar
from streamjax.commands.shell.runner import Stopped
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


def run_steps(
    trained: Iterable[AnyStep], steps: int, describe: Callable[[AnyStep], str] = lambda step: f"loss {step.loss:.4f}"
) -> Ran:
    """Run training to its end, or until a signal comes.

    Args:
      trained: one entry a step, `steps` of them, and one at least.
      steps: of the bar.
      describe: what is said of a step.

    Raises:
      ValueError: a loss that is not finite.
    """
    with StopSignals() as stop, progress_bar(total=steps, unit="step") as bar:
        for done, step in enumerate(trained, 1):
            if not math.isfinite(step.loss):
                raise ValueError(f"the loss is not finite at step {done}: nothing is written")
            metrics = describe(step)
            bar.set_postfix_str(metrics, refresh=False)
            bar.update()
            if stop.received:
                break
    return Ran(step, done, steps, metrics, stop.received or 0)
