"""Agreement between the processes of a run; with one process each function is trivial."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process counts as dead
LOST = "another process of this run has died or cannot be reached; the same command goes on from the last checkpoint"


def join_processes() -> None:
    """Make this process one of several, as `jax.distributed.initialize` does from what the cluster says.

    A process that has died is noticed in half a minute, where JAX waits for minutes.

    Raises:
      ValueError, RuntimeError: no cluster that JAX knows, or no connection.
    """
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS)


def exit_without_others(status: int) -> NoReturn:
    """End this process at once, when others have died, or wait for what it will not send.

    An ordinary exit would wait for them to end too, and then abort with a report of many lines.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


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
