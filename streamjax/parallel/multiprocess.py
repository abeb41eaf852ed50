"""Agreement between the processes of a run; with one process each function is trivial."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather_json(value: Any) -> list[Any]:
    """The values of all processes, in their order, on each of them; a value is anything that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def max_over_processes(value: int) -> int:
    """The largest of the processes' values."""
    return value if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(value))))
