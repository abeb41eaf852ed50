"""Where the numbers of a training run go: JSONL files and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from streamjax.checkpoints import replace_text
from streamjax.checkpoints.plain_json import to_json


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard event files in `workdir`.

    A run that resumes at `step` forgets what was written beyond it, since those steps are done again.
    """

    def __init__(self, workdir: str | Path, step: int):
        path = Path(workdir) / "metrics.jsonl"
        _forget(path, lambda found: found <= step)
        self._file = path.open("a")
        import tensorboardX  # which imports torch, where there is one: a second and a half

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


class SampleWriter:
    """Appends what a model wrote to `samples.jsonl` in `workdir`; lines of a step that is done again are replaced."""

    def __init__(self, workdir: str | Path):
        self._path = Path(workdir) / "samples.jsonl"
        self._newest: int | None = None

    def write(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """One line a sample: how many steps were done before it, and its values."""
        if self._newest is None:
            _forget(self._path, lambda found: found < step)
        self._newest = step
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(to_json({"step": step, **sample}) + "\n" for sample in samples)


def _forget(path: Path, keep: Callable[[float], bool]) -> None:
    """Take the lines out of a file whose steps are not kept."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if keep(_step(line))]
        replace_text(path, "".join(line + "\n" for line in kept))


def _step(line: str) -> float:
    """The step of a line; infinity where a killed process left half of one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def metrics_to_json(pending: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of steps that are not written yet, bit for bit."""
    return [
        {name: [str(np.asarray(value).dtype), np.asarray(value).item()] for name, value in found.items()}
        for found in pending
    ]


def metrics_from_json(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `metrics_to_json` was given."""
    return [{name: np.dtype(dtype).type(value) for name, (dtype, value) in found.items()} for found in values]
