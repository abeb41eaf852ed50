"""Agreement between the processes of a run; with one process each function is trivial."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import sys
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the only place that knows the coordinator, whichever cluster told it
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process counts as dead
GO_ON = "the same command goes on from what was saved last"
LOST = f"another process of this run has died or cannot be reached; {GO_ON}"


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


def on_host(tree: Any) -> Any:
    """The arrays of a tree whole, as NumPy arrays; where they lie over several processes all of these must ask.

    Example:
      >>> on_host(jax.numpy.arange(3))
      array([0, 1, 2], dtype=int32)
    """

    def is_here(leaf: Any) -> bool:
        return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated

    if all(map(is_here, jax.tree.leaves(tree))):
        return jax.device_get(tree)  # at once
    return jax.tree.map(
        lambda leaf: jax.device_get(leaf) if is_here(leaf) else multihost_utils.process_allgather(leaf, tiled=True),
        tree,
    )


def addresses() -> list[str | None]:
    """By which address each process can be reached by the others; None where there are no others."""
    if jax.process_count() == 1:
        return [None]
    coordinator = distributed.global_state.coordinator_address or ""
    found = gather_json(_address_towards(coordinator.rpartition(":")[0].strip("[]")))
    apart = [address for address in found if not ipaddress.ip_address(address).is_loopback]
    if not apart:
        return found
    # The coordinator's name may mean its own loopback on the coordinator's machine.
    own = found[jax.process_index()]
    return gather_json(own if own in apart else _address_towards(apart[0]))


def _address_towards(host: str) -> str:
    """The address of this machine from which a host is reached."""
    family, kind, _, _, place = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        return probe.getsockname()[0]


def max_over_processes(value: int) -> int:
    """The largest of the processes' values."""
    return value if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(value))))
