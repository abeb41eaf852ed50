"""Whole runs by Streaming DiLoCo: exact after a kill with a fragment on its way, and with more or fewer replicas."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.checkpoints import RunCheckpoints
from streamjax.training import DiLoCoConfig, MeshConfig, apply_overrides, train
from streamjax.training.run.loop import _Run

pytestmark = pytest.mark.usefixtures("compilation_cache")


class Killed(BaseException):
    pass


@pytest.fixture
def config(run_config):
    """Of 7 steps. Behind step 3, where a checkpoint lies, a fragment is on its way since step 2."""
    return dataclasses.replace(
        run_config,
        model=run_config.model.replace(num_layers=2),
        steps=7,
        optimizer=dataclasses.replace(run_config.optimizer, accumulation=1),
        diloco=DiLoCoConfig(replicas=2, sync_interval=4, fragments=2, overlap=2),
        checkpoint_interval=3,
        eval_interval=100,
    )


def killed_behind(step, config, workdir, monkeypatch):
    advance = _Run.advance

    def advance_or_die(run):
        if run.step == step:
            raise Killed
        advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "advance", advance_or_die)
        with pytest.raises(Killed):
            train(config, workdir)


@pytest.mark.slow
def test_a_run_goes_on_exactly_with_a_fragment_on_its_way(config, tmp_path, monkeypatch):
    expected = train(config, tmp_path / "whole")
    killed_behind(5, config, tmp_path / "killed", monkeypatch)
    assert RunCheckpoints(tmp_path / "killed" / "checkpoints").steps == [3]
    found = train(config, tmp_path / "killed")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    model = sj.load(tmp_path / "whole" / "model")
    assert model.embedding[...].shape == expected.model.embedding[...].shape[1:]
    np.testing.assert_allclose(model.embedding[...], np.mean(expected.model.embedding[...], axis=0), atol=1e-6)
    sent = [json.loads(line)["sent_bytes"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
            if "sent_bytes" in line]  # fmt: skip
    assert sent == sorted(sent)
    assert sent[-1] > sent[0] > 0


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_replicas_and_with_more(config, tmp_path, monkeypatch):
    killed_behind(5, config, tmp_path / "other", monkeypatch)  # one is lost: the other goes on, later there are four
    alone = train(apply_overrides(config, [("diloco.replicas", "1")]), tmp_path / "other")
    assert alone.model.embedding[...].shape[0] == 1
    four = apply_overrides(config, [("diloco.replicas", "4"), ("steps", "7")])
    again = train(four, tmp_path / "other", resume_from=6)
    assert again.model.embedding[...].shape[0] == 4
    assert int(again.step) == 7
    with pytest.raises(ValueError, match=r"with config\.diloco\.replicas=4, not 0: .*; choose another --workdir$"):
        train(apply_overrides(config, [("diloco.replicas", "0")]), tmp_path / "other")


def test_what_replicas_cannot_do_is_said_in_a_line(config, tmp_path):
    for changes, message in (
        ({"data.batch_size": "5"}, r"^data\.batch_size 5 is not a multiple of 2: diloco\.replicas times"),
        ({"diloco.replicas": "0", "mesh.replica": "2"}, r"^mesh\.replica is 2: .* set diloco\.replicas, too$"),
        ({"diloco.fragments": "3"}, r"^diloco\.fragments is 3, and the model has 2 layers: use at most 2$"),
        ({"backprop.carry_state": "true", "data.packing": "streams"}, r"^diloco.replicas is 2, and backprop\.carry"),
    ):
        with pytest.raises(ValueError, match=message):
            train(apply_overrides(config, list(changes.items())), tmp_path / "run")
    spread = dataclasses.replace(config, mesh=MeshConfig(replica=8), data=config.data)
    with pytest.raises(ValueError, match=r"^diloco\.replicas is 2, and mesh\.replica 8: .* a divisor of 2$"):
        train(spread, tmp_path / "run")
    assert not (tmp_path / "run").exists()
