"""Copies of checkpoints at an address: a run whose folder is lost goes on from them, with the same bits."""

import dataclasses
import shutil

import fsspec
import numpy as np
import pytest

from streamjax.checkpoints.copies import CheckpointCopies
from streamjax.training import train
from tests.training.run.test_loop import Killed, at_step, kill, read_metrics, same_bits  # noqa: F401

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(params=["memory", "folder"])
def address(request, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    return "memory://bucket/runs/mine" if request.param == "memory" else str(tmp_path / "far" / "mine")


def test_a_run_whose_folder_is_lost_goes_on_from_its_copies(run_config, address, tmp_path, at_step, caplog):  # noqa: F811
    whole = train(run_config, tmp_path / "whole")
    config = dataclasses.replace(run_config, checkpoint_copies=address, keep_checkpoints=2)
    at_step(9, kill)
    with pytest.raises(Killed):
        train(config, tmp_path / "run")
    assert CheckpointCopies(address).steps == [4, 8]
    shutil.rmtree(tmp_path / "run")
    with caplog.at_level("INFO"):
        found = train(config, tmp_path / "run")
    assert f"step 8 comes from {address}" in caplog.text
    assert same_bits(found, whole)
    after = [line for line in read_metrics(tmp_path / "whole") if line["step"] > 8]
    assert read_metrics(tmp_path / "run") == after
    assert CheckpointCopies(address).steps == [8, 12]

    with pytest.raises(ValueError, match=rf"{address} holds a run with config.seed=0, not 1: set checkpoint_copies"):
        train(dataclasses.replace(config, seed=1), tmp_path / "other")
    again = train(config, tmp_path / "again", resume_from=8)
    assert same_bits(again, whole)
    aside = CheckpointCopies(f"{address}_set_aside")
    assert (aside.steps, CheckpointCopies(address).steps) == ([12], [8, 12])


def written(folder, step):
    """A checkpoint as far as copies know it, which has its name when it is whole."""
    place = folder / f"{step}.partial"
    (place / "arrays" / "d").mkdir(parents=True)
    (place / "arrays" / "d" / "0").write_bytes(np.random.default_rng(step).bytes(1000))
    (place / "z.json").write_text("{}")
    (place / "checksums.json").write_text(f"{step}")
    return place.rename(folder / str(step))


def content(place):
    return {file.relative_to(place).as_posix(): file.read_bytes() for file in place.rglob("*") if file.is_file()}


def test_a_copy_is_whole_or_is_none(address, tmp_path, monkeypatch, caplog):
    copies = CheckpointCopies(address, keep=2)
    put, order = type(copies._fs).put_file, []

    def breaks(self, file, target, **known):
        order.append(target.split("/mine/")[1])
        if order[-1] == "1/checksums.json" and order.count(order[-1]) == 1:
            raise OSError("the link is down")
        return put(self, file, target, **known)

    monkeypatch.setattr(type(copies._fs), "put_file", breaks)
    here = tmp_path / "here"
    first = written(here, 1)
    copies.send(here, 1)
    copies.close()
    assert copies.steps == []
    assert f"step 1 was not copied to {address}: the link is down" in caplog.text
    assert order == ["1/arrays/d/0", "1/z.json", "1/checksums.json"]

    copies = CheckpointCopies(address, keep=2)
    copies.send(here, 1)
    copies.send(here, 7)  # has no name yet, and never gets one
    copies.close()
    assert copies.steps == [1]
    copies.fetch(1, tmp_path / "there")
    assert content(tmp_path / "there" / "1") == content(first)
    assert [place.name for place in tmp_path.iterdir()].count("there_fetched") == 0

    copies = CheckpointCopies(address, keep=2)
    for step in (3, 20):
        copies.send(here, step)
        written(here, step)
    copies.close()
    assert copies.steps == [3, 20]  # numbers, not names
    copies.set_aside_after(3)
    assert copies.steps == [3]
    aside = CheckpointCopies(f"{address}_set_aside")
    aside.fetch(20, tmp_path / "there")
    assert content(tmp_path / "there" / "20") == content(here / "20")


@pytest.mark.parametrize("wrong", ["nonsense://bucket/x", "/dev/null/x"])
def test_an_address_that_leads_nowhere_is_one_line(wrong):
    with pytest.raises(ValueError, match=rf"the address {wrong} cannot be used: ") as found:
        CheckpointCopies(wrong)
    assert "\n" not in str(found.value)
