"""Runs that go on from snapshots in memory: with the same bits, and without a checkpoint on the disk."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.tiny import get_config
from streamjax.snapshots import client
from streamjax.training import RunStopped, train
from streamjax.training.run.config import SnapshotConfig
from streamjax.training.run.goodput import Goodput
from streamjax.training.run.loop import _Run
from tests.training.conftest import CONFIG as MODEL

CLOCKS = {"tokens_per_second", *Goodput().metrics()}
CONFIG = dataclasses.replace(
    get_config(), model=MODEL.replace(vocab_size=259, num_layers=1),
    data=dataclasses.replace(get_config().data, seq_len=32, batch_size=4),
    steps=12, checkpoint_interval=1000, eval_interval=1000, eval_batches=1, log_interval=5,
    snapshots=SnapshotConfig(interval=3, keep_minutes=2.0),
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("compilation_cache")


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does."""


@pytest.fixture
def at_step(monkeypatch, tmp_path):
    """at_step(n, action): run `action(run)` after step n, once."""
    folder = tempfile.mkdtemp(dir="/tmp")  # a socket's path must be short
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr("tempfile.tempdir", None)
    advance, actions = _Run.advance, {}

    def advance_then_act(run):
        advance(run)
        if run.step in actions:
            actions.pop(run.step)(run)

    monkeypatch.setattr(_Run, "advance", advance_then_act)
    return actions.__setitem__


def kill(run):
    raise Killed


def bits(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def sockets():
    return [path for path in Path(tempfile.gettempdir()).glob("streamjax-*/*") if path.is_socket()]


def test_a_killed_run_goes_on_from_memory_and_its_keeper_ends_with_it(tmp_path, at_step, caplog):
    whole = train(dataclasses.replace(CONFIG, snapshots=SnapshotConfig()), tmp_path / "whole")
    for step in (5, 7):
        at_step(step, kill)
        with pytest.raises(Killed):
            train(CONFIG, tmp_path / "run")
        assert not list((tmp_path / "run" / "checkpoints").iterdir())
        assert len(sockets()) == 1
    with caplog.at_level("INFO", logger="streamjax"):
        found = train(CONFIG, tmp_path / "run", progress=False)
    assert "resumed at step 6 of 12, from memory" in caplog.text
    assert bits(found) == bits(whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_later_checkpoint_and_a_chosen_step_come_before_memory(tmp_path, at_step, caplog):
    config = dataclasses.replace(CONFIG, checkpoint_interval=4)
    at_step(5, kill)
    with pytest.raises(Killed):
        train(config, tmp_path / "run")
    at_step(5, kill)
    with caplog.at_level("INFO", logger="streamjax"), pytest.raises(Killed):
        train(config, tmp_path / "run", progress=False)
    assert "resumed at step 4 of 12\n" in caplog.text
    at_step(8, kill)
    with pytest.raises(Killed):
        train(config, tmp_path / "run")
    caplog.clear()  # the level may be INFO already, from another test
    with caplog.at_level("INFO", logger="streamjax"):
        train(config, tmp_path / "run", progress=False, resume_from=4)
    assert "from memory" not in caplog.text
    assert caplog.text.count("resumed at step 4") == 1


def test_weights_that_are_not_finite_are_kept_nowhere(tmp_path, at_step):
    def spoil(run):
        run.pending[-1]["loss"] = np.float32(np.nan)

    at_step(6, spoil)
    with pytest.raises(RunStopped, match="not finite at step 6"):
        train(CONFIG, tmp_path / "run")


def test_a_keeper_that_cannot_start_is_one_line(tmp_path, at_step, monkeypatch):
    monkeypatch.setattr(client.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="the keeper of snapshots did not start") as raised:
        train(CONFIG, tmp_path / "run")
    assert "\n" not in str(raised.value)
