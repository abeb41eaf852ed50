"""What snapshots in memory cost, beside a checkpoint of the same state on this machine's disk.

    python -m benchmarks.training.snapshots                    # a minute
    python -m benchmarks.training.snapshots --megabytes=1024

Machines are keepers on this one machine, each with a state of its own of that size. `wait` is the copy that training
waits for, `send` the CPU seconds in which a training process gives it to its keeper beside the next steps, `code` those
of a machine's keeper, all for one snapshot. `MB held` is a keeper's resident memory with one snapshot, `peak` with the
next one on its way. `restore` are CPU seconds in which one process gets its state back from its own keeper, `lost`
those where that keeper is gone and the others' codes are used. Medians of several snapshots.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.reporting import report
from streamjax.checkpoints import RunCheckpoints
from streamjax.snapshots.choosing import Reader, held_by
from streamjax.snapshots.client import HOST, find_or_start
from streamjax.snapshots.messages import request
from streamjax.snapshots.shards import from_bytes, sealed, to_parts

KEY, SECONDS, LEAVES = b"a benchmark's key", 600.0, 16


def cpu_seconds(pid: int) -> float:
    """Of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, name: str) -> float:
    """MB of a process: VmRSS now, VmHWM at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024 / 1e6


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


class Machine:
    """A keeper that plays a machine."""

    def __init__(self, number: int):
        os.environ[HOST] = f"machine{number}"
        self.connection = find_or_start(KEY, 60.0)
        self.address = ["127.0.0.1", self.ask(op="listen", host="127.0.0.1")["port"]]
        self.pid = self.ask(op="status")["pid"]

    def ask(self, data: Any = (), **head: Any) -> dict[str, Any]:
        return request(self.connection, head, data)[0]


def measure(hosts: int, megabytes: int, snapshots: int) -> dict[str, Any]:
    """A row of the table."""
    machines = [Machine(number) for number in range(hosts)]
    others = [[number, machine.address] for number, machine in enumerate(machines)]
    for number, machine in enumerate(machines):
        machine.ask(op="join", start_id="0", layout=[hosts, 8, 1], host=number, others=others, keep=None)
    key = jax.random.key(0)
    state = {str(leaf): jax.random.normal(key, (megabytes * 250_000 // LEAVES,)) for leaf in range(LEAVES)}
    jax.block_until_ready(state)
    found: dict[str, list[float]] = {name: [] for name in ("wait", "send", "code")}
    for step in range(1, snapshots + 1):
        before = [cpu_seconds(machine.pid) for machine in machines]
        wait, parts = timed(lambda: to_parts(state, {}))
        sends = []
        for number, machine in enumerate(machines):
            head = {"op": "put", "start_id": "0", "step": step, "process": number, "local": [number]}
            sends.append(timed(lambda m=machine, h=head, p=parts: m.ask(sealed(p), **h))[0])
        for machine in machines:
            assert machine.ask(op="wait", start_id="0", step=step, seconds=SECONDS)["complete"]
        found["wait"].append(wait)
        found["send"].append(statistics.mean(sends))
        code = [cpu_seconds(machine.pid) - cpu for machine, cpu in zip(machines, before, strict=True)]
        found["code"].append(statistics.mean(code))
    row: dict[str, Any] = {"machines": hosts, "MB a machine": megabytes}
    row |= {f"{name} s": statistics.median(values) for name, values in found.items()}
    row["MB held"], row["peak"] = memory(machines[-1].pid, "VmRSS"), memory(machines[-1].pid, "VmHWM")
    statuses = [(machine.address, machine.ask(op="status")["held"]) for machine in machines]
    for name, there in (("restore", statuses), ("lost", statuses[1:])):
        if there:
            reader = Reader(("0", snapshots), held_by(there)["0", snapshots], KEY)
            row[f"{name} s"], (back, _) = timed(lambda r=reader: from_bytes(r.read(0), state))
            reader.close()
            assert all(np.array_equal(back[leaf], state[leaf]) for leaf in state)
    for machine in machines:
        machine.ask(op="stop")
        machine.connection.close()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = RunCheckpoints(folder)
        checkpoints.save(1, state, {})  # the first one starts threads
        row["checkpoint s"], _ = timed(lambda: checkpoints.save(2, state, {}))
        checkpoints.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=128, help="of each machine's state")
    parser.add_argument("--snapshots", type=int, default=3)
    arguments = parser.parse_args()
    rows = [measure(hosts, arguments.megabytes, arguments.snapshots) for hosts in (1, 2, 4, 8)]
    report("training/snapshots", rows, snapshots=arguments.snapshots)


if __name__ == "__main__":
    main()
