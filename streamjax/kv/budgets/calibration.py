"""`Calibration`: what a budget has measured of a model, in a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from streamjax.checkpoints import require_file, user_path
from streamjax.kv.budgets.budget import Budget


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A row of numbers for each layer that a budget divides a total among.

    table: the rows. budget: the name of the class that has measured them. model: a fingerprint of the model's weights.
    """

    table: tuple[tuple[float, ...], ...]
    budget: str
    model: str

    @classmethod
    def of(cls, table: Float[np.ndarray, "L M"], budget: Budget, model: str) -> Calibration:
        rows = tuple(tuple(float(x) for x in row) for row in np.asarray(table, np.float32))
        return cls(rows, budget.measured_by, model)

    @property
    def numbers(self) -> Float[np.ndarray, "L M"]:
        return np.array(self.table, np.float64)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        about = {"kind": "budget", "budget": self.budget, "model": self.model}
        save_file({"table": np.array(self.table, np.float32)}, user_path(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        path = user_path(path)
        try:
            require_file(path)
            with safe_open(path, "numpy") as file:
                about, table = file.metadata() or {}, file.get_tensor("table")
            if about.get("kind") != "budget" or table.ndim != 2 or not table.size or not np.isfinite(table).all():
                raise ValueError("it is no table of numbers with a budget's name")
            return cls(tuple(tuple(map(float, row)) for row in table), about["budget"], about["model"])
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path}: no calibration of a budget could be read: {reason}") from None
