"""A run of training that is killed at any moment, again and again, ends with the bits of one that nobody disturbed."""

import dataclasses
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.test_train import IMPORTS
from tests.processes import one_device_flags
from tests.training.conftest import run_config as run_config
from tests.training.conftest import text_folder as text_folder

ROOT = Path(__file__).parents[2]
KILLS = 46 if os.environ.get("SOAK") else 3
PATIENCE = 600.0  # seconds for a run to come to a step, on a machine that has much else to do


def start(config: Path, workdir: Path) -> subprocess.Popen:
    cached = f"--compilation_cache={config.parent / 'compiled'}"
    command = [sys.executable, "-m", "train", f"--config={config}", f"--workdir={workdir}", cached]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device_flags()}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def lines(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_while_it_runs(process: subprocess.Popen, workdir: Path, rng: random.Random) -> bool:
    """SIGKILL a moment behind the next line of its metrics: in a step, in a save, between two. False: it had ended."""
    before, end = lines(workdir), time.monotonic() + PATIENCE
    while lines(workdir) <= before and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    ended = process.poll() is not None
    process.kill()
    _, errors = process.communicate()
    assert not ended or process.returncode == 0, errors
    return not ended


def end_well(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors


@pytest.mark.slow
def test_kills_at_any_moment_change_no_bit(run_config, tmp_path):
    """Chains of runs, each killed until it is done: `KILLS` kills in all."""
    config = dataclasses.replace(run_config, steps=60, log_interval=1, checkpoint_interval=2)
    file, whole = tmp_path / "config.py", tmp_path / "undisturbed"
    file.write_text(f"{IMPORTS}\ndef get_config():\n    return {config!r}\n")
    end_well(start(file, whole))
    rng, kills, chains = random.Random(0), 0, 0
    while kills < KILLS:
        workdir, chains = tmp_path / f"chain_{chains}", chains + 1
        while kills < KILLS and kill_while_it_runs(start(file, workdir), workdir, rng):
            kills += 1
        end_well(start(file, workdir))
        for name in ("model.safetensors", "config.json"):
            assert (workdir / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
