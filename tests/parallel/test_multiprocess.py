"""Several processes: how they join, and that one which has lost the others ends at once, in one line."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from streamjax.commands import train as command
from streamjax.parallel import multiprocess
from streamjax.training import TrainState


def test_a_dead_process_is_noticed_in_less_than_a_minute(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: given.update(options))
    multiprocess.join_processes()
    assert set(given) == {"heartbeat_timeout_seconds", "shutdown_timeout_seconds"}
    assert max(given.values()) < 60


class Unwatched:
    """A watch that never learns anything."""

    def wait(self, seconds):
        pass

    def leave(self, failed=False):
        assert failed


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (jax.errors.JaxRuntimeError("Gloo AllGather failed:\nread error"), multiprocess.LOST),
        (ValueError("no such file"), "error: no such file"),
    ],
)
def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch, capsys, tmp_path, error, said):
    def fails(*_, **__) -> TrainState:
        raise error

    def exits(status):
        raise SystemExit(status)

    monkeypatch.setattr(command, "train", fails)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(command, "exit_without_others", exits)
    monkeypatch.setattr(command, "Watch", lambda on_lost: Unwatched())
    with pytest.raises(SystemExit, match="1"):
        command.main(["train", "--config=configs/tiny.py", f"--workdir={tmp_path}", "--traceback=false"])
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def start(rank, port, workdir):
    """One of two processes, as Open MPI starts them."""
    ours = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }
    arguments = [f"--workdir={workdir}", "--distributed", "--config.mesh.data=2", "--config.steps=1000000"]
    return subprocess.Popen(
        [sys.executable, "-m", "train", "--config=configs/tiny.py", "--config.checkpoint_interval=20", *arguments],
        env={**os.environ, **ours},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])  # the coordinator, and another one
def test_a_process_that_is_killed_ends_the_run_in_a_line_that_names_it(tmp_path, victim):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(rank, port, tmp_path / "run") for rank in (0, 1)]
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "run" / "checkpoints" / "20").is_dir():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.2)
        processes[victim].send_signal(signal.SIGKILL)
        _, said = processes[1 - victim].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[1 - victim].returncode == 1
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: process {victim} of 2 has died or cannot be reached; {multiprocess.GO_ON}"]
    assert "Check failure stack trace" not in said
