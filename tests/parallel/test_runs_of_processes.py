"""Runs of two and four processes: killed and begun again they end with the same bits, and with others they go on."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from streamjax.training.run.goodput import Goodput
from tests.processes import environments, wait_for

CLOCKS = {"tokens_per_second", *Goodput().metrics()}
DEADLINE = 540  # seconds, on a machine that has much else to do
SHORT = ("steps=40", "checkpoint_interval=4", "log_interval=4", "eval_interval=40", "eval_batches=2",
         "diloco.sync_interval=6", "diloco.overlap=3", "data.seq_len=32")  # fmt: skip


def start(workdir, count, *changes):
    """So many processes of one run."""
    arguments = [f"--config.{change}" for change in (*SHORT, *changes)] + ["--distributed"] * (count > 1)
    command = [sys.executable, "-m", "train", "--config=configs/tiny.py", f"--workdir={workdir}", *arguments]
    return [subprocess.Popen(command, env=each, stderr=subprocess.PIPE, text=True) for each in environments(count)]


def finish(processes):
    """Wait for all to end well."""
    wait_for(processes, DEADLINE)


def kill_one_behind(step, workdir, processes):
    """SIGKILL the last process when a checkpoint of `step` is there; the others end by themselves, in a minute."""
    try:
        deadline = time.monotonic() + DEADLINE
        while not (workdir / "checkpoints" / str(step)).is_dir():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes), "a process ended before it was killed"
            time.sleep(0.05)
        processes[-1].send_signal(signal.SIGKILL)
        for process in processes[:-1]:
            _, said = process.communicate(timeout=DEADLINE)
            assert process.returncode == 1
            assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1, said
    finally:
        for process in processes:
            process.kill()
            process.wait()


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh", "afterwards", "same_rows"),
    [
        (2, ("mesh.fsdp=2",), (1, ("mesh.fsdp=1",)), False),
        (2, ("mesh.context=2",), (1, ("mesh.data=1",)), True),
        (4, ("mesh.fsdp=4",), (2, ("mesh.fsdp=2",)), False),
        (4, ("mesh.data=2", "mesh.tensor=2"), (2, ("mesh.data=2",)), True),
        (2, ("diloco.replicas=2", "mesh.replica=2"), (1, ("diloco.replicas=2",)), False),
        (4, ("diloco.replicas=4", "mesh.replica=4"), (1, ("diloco.replicas=4",)), False),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, count, mesh, afterwards, same_rows):
    """Processes along `tensor` and `context` read the same rows: fewer, without that axis, go on from their place."""
    whole, killed, other = tmp_path / "whole", tmp_path / "killed", tmp_path / "other"
    finish(start(whole, count, *mesh))
    kill_one_behind(4, killed, start(killed, count, *mesh))
    assert metrics(killed)[-1]["step"] < 40
    shutil.copytree(killed, other)
    finish(start(killed, count, *mesh))
    assert metrics(killed) == metrics(whole)
    fewer, changed = afterwards
    finish(start(other, fewer, *changed))
    found, expected = metrics(other)[-1], metrics(whole)[-1]
    assert found["step"] == expected["step"] == 40
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3 if same_rows else 0.2)
    if same_rows:
        losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (other, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_run_that_is_killed_goes_on_from_memory_with_the_same_bits(tmp_path, count):
    """The soak of benchmarks/training, a few kills long; each process plays a machine, and some machines are lost."""
    output, soak = tmp_path / "soak.json", [sys.executable, "-m", "benchmarks.training.snapshots_soak"]
    subprocess.run([*soak, "--kills=3", f"--processes={count}", f"--output={output}"], check=True, timeout=1800)
    (row,) = json.loads(output.read_text())["rows"]
    assert row["kills"] == 3
    assert row["same metrics"] == row["same weights"] == "yes"
    assert row["lines that name it"] == 3 * (count - 1)
    assert row["worst end s"] < 60
