"""Where the numbers of a training run go: a JSONL file and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import tensorboardX

from streamjax.checkpoints import replace_text
from streamjax.checkpoints.plain_json import to_json


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard event files in `workdir`.

    A run that resumes at `step` forgets what was written beyond it, since those steps are done again.
    """

    def __init__(self, workdir: str | Path, step: int):
        self._path = Path(workdir) / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= step]
            replace_text(self._path, "".join(line + "\n" for line in kept))
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line: the step and its values; null for one that is not finite."""
        self._file.write(to_json({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def _step(line: str) -> float:
    """The step of a line; infinity where a killed process left half of one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
