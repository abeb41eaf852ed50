"""Where the time of a run went: steps, input, evaluation, checkpoints, starts, and what restarts cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

_SHARES = ("steps", "data", "evaluation", "checkpoints", "start")


class Goodput:
    """Adds up seconds from the first start of a run on.

    What a checkpoint holds is what was spent up to it. The time since then of which a later start knows nothing was
    lost: steps that are done again, and the time until the run was started again.
    """

    def __init__(self) -> None:
        self._began = time.time()
        self._seconds = dict.fromkeys(_SHARES, 0.0)
        self._share, self._since = "start", time.monotonic()

    def switch(self, share: str) -> str:
        """Count the time from now on as spent for `share`; what it was before."""
        now, before = time.monotonic(), self._share
        self._seconds[before] += now - self._since
        self._share, self._since = share, now
        return before

    @contextlib.contextmanager
    def spending(self, share: str) -> Iterator[None]:
        """Count the time inside as spent for `share`."""
        before = self.switch(share)
        try:
            yield
        finally:
            self.switch(before)

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint is to hold."""
        self.switch(self._share)
        return {"began": self._began, "seconds": dict(self._seconds)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint held; this start's own time counts on top of it."""
        self._began = state["began"]
        for share, seconds in state["seconds"].items():
            self._seconds[share] += seconds

    def metrics(self) -> dict[str, float]:
        """Seconds by what they were spent for, and the share of the whole that went into steps."""
        self.switch(self._share)
        known = sum(self._seconds.values())
        lost = max(0.0, time.time() - self._began - known)
        seconds = {**self._seconds, "restarts": lost}
        return {
            "goodput": round(self._seconds["steps"] / max(known + lost, 1e-9), 4),
            **{f"seconds_{share}": round(value, 3) for share, value in seconds.items()},
        }
