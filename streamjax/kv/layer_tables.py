"""`LayerTables`: what was measured or trained for a layer, as a rule takes it that has to be hashed and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from streamjax.field_checks import hashed_once

Tables = TypeVar("Tables", bound="LayerTables")


@hashed_once
@dataclasses.dataclass(frozen=True, repr=False)
class LayerTables:
    """Tables of float32 as bytes, which hash once. A subclass says in its docstring which there are.

    data, shapes: of each table. model: a fingerprint of the model that they were made for.
    """

    data: tuple[bytes, ...]
    shapes: tuple[tuple[int, ...], ...]
    model: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' and '.join(map(str, self.shapes))}, of model {self.model or 'in a state'})"

    @classmethod
    def from_arrays(cls: type[Tables], *arrays: np.ndarray, model: str) -> Tables:
        """These tables.

        Example:
          >>> import numpy as np
          >>> tables = LayerTables.from_arrays(np.ones((2, 3)), model="whose")
          >>> tables.arrays[0].shape
          (2, 3)
        """
        found = [np.ascontiguousarray(x, np.float32) for x in arrays]
        return cls(tuple(x.tobytes() for x in found), tuple(x.shape for x in found), model)

    @property
    def arrays(self) -> Sequence[np.ndarray]:
        return tuple(np.frombuffer(x, np.float32).reshape(y) for x, y in zip(self.data, self.shapes, strict=True))

    def without_numbers(self: Tables) -> Tables:
        """Equal for layers whose tables have the same shapes; a state holds the numbers."""
        return type(self)((), self.shapes, "")

    def in_state(self, rows: int, dtype: jnp.dtype = jnp.float32) -> tuple[Array, ...]:
        """The tables as a stream's state holds them, once each row: [B, 1, ...]."""
        return tuple(jnp.broadcast_to(jnp.asarray(x, dtype), (rows, 1, *x.shape)) for x in self.arrays)
