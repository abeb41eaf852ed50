"""A run of several processes that is killed again and again, and goes on from memory, against one that is not.

    python -m benchmarks.training.snapshots_soak                                # 200 kills; an hour on 2 quiet cores
    python -m benchmarks.training.snapshots_soak --kills=10 --processes=4

Each process plays a machine with a keeper of its own. At a random moment one process is killed (SIGKILL), in half of
the cases its keeper too: a machine is lost. The others end by themselves, each with a line that names the one that is
gone; then all start again. No checkpoint is written before the end. In the end metrics and weights must have the same
bits as those of a run that was never killed.

`worst end s`: from a kill to the end of the last process. Processes are forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reporting import report
from streamjax.commands import train as command
from streamjax.snapshots.client import HOST, socket_path
from streamjax.snapshots.messages import connect, request

CLOCKS = ("tokens_per_second", "goodput", "seconds_")
STEPS_A_KILL = 16


class Run:
    """A run in a folder, of processes that are started together."""

    def __init__(self, folder: Path, processes: int, steps: int, *changes: str):
        self.folder, self.count = folder, processes
        config = (
            f"mesh.fsdp={processes}", f"steps={steps}", "checkpoint_interval=1000000", "log_interval=2",
            "eval_interval=1000000", "eval_batches=1", "data.seq_len=32", *changes,
        )  # fmt: skip
        self.argv = ["train", "--config=configs/tiny.py", f"--workdir={folder}", "--distributed"]
        self.argv += [f"--compilation_cache={folder.parent / 'compiled'}", *(f"--config.{change}" for change in config)]

    def start(self) -> list[int]:
        """The process ids."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [self._fork(rank, port) for rank in range(self.count)]

    def _fork(self, rank: int, port: int) -> int:
        child = os.fork()
        if child:
            return child
        os.environ |= {
            HOST: f"machine{rank}", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": str(self.count),
            "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        }  # fmt: skip
        log = os.open(self.log(rank), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            status = command.main(self.argv)
        except BaseException:  # the parent goes on with its own work, and a child must not do it too
            status = 70
        os._exit(status)

    def log(self, rank: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{rank}.log")

    @property
    def step(self) -> int:
        """The last step that metrics tell."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"]
        except (OSError, IndexError, ValueError):
            return 0

    def kill_keeper(self, rank: int) -> None:
        """SIGKILL the keeper of a process."""
        key = bytes.fromhex((self.folder / "snapshots_key").read_text())
        before, os.environ[HOST] = os.environ.get(HOST, ""), f"machine{rank}"
        with connect(str(socket_path(key)), key) as connection:
            pid = request(connection, {"op": "status"})[0]["pid"]
        os.environ[HOST] = before
        os.kill(pid, signal.SIGKILL)

    def metrics(self) -> list[dict[str, Any]]:
        """Without clocks."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: x for name, x in line.items() if not name.startswith(CLOCKS)} for line in lines]

    def weights(self) -> str:
        """A hash of them. Starts JAX."""
        import jax
        import numpy as np

        import streamjax as sj

        digest = hashlib.sha256()
        for array in jax.tree.leaves(sj.load(self.folder / "model")):
            digest.update(np.asarray(array).tobytes())
        return digest.hexdigest()


def wait(children: list[int]) -> list[int]:
    """Their exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def ended(children: list[int]) -> bool:
    """Whether any has ended; it stays to be waited for."""
    return any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children)


def soak(run: Run, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill it so many times, then let it end."""
    found = {"kills": 0, "machines lost": 0, "worst end s": 0.0}
    while True:
        children, begin = run.start(), run.step
        last = found["kills"] == kills
        while not ended(children) and (last or run.step < begin + draw.choice((2, 4, 6, 8))):
            time.sleep(0.05)
        if last or ended(children):
            statuses = wait(children)
            assert not any(statuses), f"statuses {statuses}; {run.log(0)} says why"
            return found
        victim = draw.randrange(run.count)
        time.sleep(draw.random() / 10)
        os.kill(children[victim], signal.SIGKILL)
        if draw.random() < 0.5:
            run.kill_keeper(victim)
            found["machines lost"] += 1
        since = time.monotonic()
        wait(children)
        found["worst end s"] = max(found["worst end s"], time.monotonic() - since)
        found["kills"] += 1
        print(f"killed {found['kills']} times, at step {run.step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=STEPS_A_KILL, help="of the run, for each kill")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON of the result; benchmarks/results by default")
    arguments = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    steps = arguments.steps * (arguments.kills + 1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
        whole = Run(Path(temporary) / "whole", arguments.processes, steps)
        assert not any(wait(whole.start()))
        killed = Run(Path(temporary) / "killed", arguments.processes, steps, "snapshots.interval=2")
        row = soak(killed, arguments.kills, random.Random(0))
        logs = "".join(killed.log(rank).read_text() for rank in range(arguments.processes))
        child = os.fork()  # JAX starts in a process that forks no more
        if not child:
            row |= {
                "resumed from memory": logs.count("from memory"),
                "lines that name it": logs.count("has died or cannot be reached; the same"),
                "same metrics": "yes" if killed.metrics() == whole.metrics() else "no",
                "same weights": "yes" if killed.weights() == whole.weights() else "no",
            }
            rows = [{"processes": arguments.processes, "steps": steps, **row}]
            report("training/snapshots_soak", rows, arguments.output)
            sys.stdout.flush()
            os._exit(0)
        wait([child])


if __name__ == "__main__":
    main()
