"""`Calibration`: what a budget has measured of a model, in a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from streamjax.checkpoints import user_path
from streamjax.checkpoints.measured_files import measured_file
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
    def from_table(cls, table: Float[np.ndarray, "L M"], budget: Budget, model: str) -> Calibration:
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
        otherwise = "it is no table of numbers with a budget's name"
        with measured_file(path, "budget", "calibration of a budget", otherwise) as (file, about):
            table = file.get_tensor("table")
            if table.ndim != 2 or not table.size or not np.isfinite(table).all():
                raise ValueError(otherwise)
            return cls(tuple(tuple(map(float, row)) for row in table), about["budget"], about["model"])
