"""What the engine asks of a scheduling policy."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Work(Protocol):
    """What a policy may know of a request."""

    @property
    def reading_steps(self) -> int:
        """Iterations that what is left of its prompt takes: chunks."""
        ...


@runtime_checkable
class Policy(Protocol):
    """An order among the requests that are not finished. Iterations of the engine are its clock."""

    def add(self, work: Any) -> None:
        """A request has come."""
        ...

    def remove(self, work: Any) -> None:
        """A request has ended."""
        ...

    def ran(self, work: Any) -> None:
        """A request has had an iteration: a chunk of its prompt, or a token."""
        ...

    def choose(self, rows: int) -> list[Any]:
        """The requests that should have the rows now, at most so many, the most urgent first.

        Called once an iteration. One that runs and is not among them is preempted if its row is needed.
        """
        ...
