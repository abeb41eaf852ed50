"""Saves that die at any point, or run out of disk: what can be loaded is the old or the new one, and nothing stays."""

import itertools
import os
import pathlib
import resource

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.checkpoints import SaveError, replacing
from streamjax.models import RopeConfig, UniformConfig
from tests.models.random_decoders import random_decoder

CONFIG = UniformConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=48, tie_embeddings=True
)


class Killed(BaseException):
    """Ends a save at once, as SIGKILL does."""


@pytest.fixture(scope="module")
def old():
    return random_decoder(CONFIG)


@pytest.fixture(scope="module")
def new():
    """Tensors of the same shapes; only the configuration tells that they mean something else."""
    return random_decoder(CONFIG.replace(rope=RopeConfig(theta=1e6)), 1)


def save_adapters(model, path):
    sj.save_lora(
        sj.add_lora(model, 64, 4.0, ["q", "up"], jax.random.key(int(model.config.blocks[0].mixer.rope.theta))), path
    )


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return a.config == b.config and all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(n, exchange): end the process, so to speak, at its n-th call that changes files."""

    def arm(n, exchange):
        calls = itertools.count(1)

        def counted(function):
            def call(*arguments, **options):
                if next(calls) == n:
                    raise Killed
                return function(*arguments, **options)

            return call

        for name in ("rename", "replace", "fsync", "link", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, counted(getattr(os, name)))
        for name in ("open", "write_text"):
            monkeypatch.setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
        monkeypatch.setattr(replacing, "_exchange", counted(replacing._exchange) if exchange else lambda *_: False)
        monkeypatch.setattr(replacing, "discard", lambda fresh: None)

    return arm


@pytest.mark.usual("save_hf-True")
@pytest.mark.parametrize(
    ("save", "exchange"),
    [
        (sj.save_hf, True),
        (sj.save_safetensors, False),
        pytest.param(sj.save_hf, False, marks=pytest.mark.slow),  # the folder changes places as above
        pytest.param(sj.save_safetensors, True, marks=pytest.mark.slow),
    ],
)
def test_a_save_that_is_killed_at_any_point(save, exchange, old, new, tmp_path, kill_at, monkeypatch):
    path, found = tmp_path / "m", set()
    for n in itertools.count(1):
        save(old, path)
        (path / "tokenizer.json").write_text("a user's")
        kill_at(n, exchange)
        try:
            save(new, path)
            done = True
        except Killed:
            done = False
        monkeypatch.undo()
        loaded = sj.load(path)
        assert same(loaded, old) or same(loaded, new)
        found.add("old" if same(loaded, old) else "new")
        save(new, path)
        assert same(sj.load(path), new)
        assert (path / "tokenizer.json").read_text() == "a user's"
        assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
        names = {entry.name for entry in path.iterdir()}
        assert names == {"model.safetensors", "config.json", "checksums.json", "tokenizer.json"}
        if done:
            break
    assert n > 10
    assert found == {"old", "new"}


def test_a_folder_that_must_stay_where_it_is(old, new, tmp_path, monkeypatch):
    """The working folder, or one where a disk is mounted: its entries are replaced; what is half done is refused."""
    path = tmp_path / "m"
    sj.save_hf(old, path, max_shard_size=10_000)
    (path / "tokenizer.json").write_text("a user's")
    place = path.stat().st_ino
    monkeypatch.chdir(path)
    refused = 0
    for n in itertools.count(1):
        with monkeypatch.context() as patches:
            patches.setattr(replacing, "discard", lambda fresh: None)
            calls = itertools.count(1)

            def replace(*names, real=os.replace, calls=calls, n=n):
                if next(calls) == n:
                    raise Killed
                real(*names)

            patches.setattr(os, "replace", replace)
            try:
                sj.save_hf(new, ".")
                break
            except Killed:
                pass
        try:
            assert same(sj.load(path), old)
        except ValueError as error:
            refused += "checksums.json" in str(error) or "missing" in str(error)
        sj.save_hf(old, ".", max_shard_size=10_000)
        assert same(sj.load(path), old)
    assert refused
    assert path.stat().st_ino == place
    assert same(sj.load(path), new)
    names = {"model.safetensors", "config.json", "checksums.json", "tokenizer.json"}
    assert {entry.name for entry in path.iterdir()} == names


def test_a_link_to_a_folder_stays_a_link(old, new, tmp_path):
    sj.save_hf(old, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    sj.save_hf(new, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same(sj.load(tmp_path / "real"), new)


@pytest.mark.weekly("save-500", "save-3000")
@pytest.mark.parametrize("limit", [0, 500, 3000, 20_000])
@pytest.mark.parametrize("save", [sj.save_hf, sj.save_safetensors, sj.save, save_adapters])
def test_a_disk_that_is_full(save, limit, old, new, tmp_path):
    path = tmp_path / "m"
    save(old, path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a longer file fails as on a full disk
    try:
        with pytest.raises(SaveError, match=rf"{path} was not saved: .*; what was there before is as it was") as error:
            save(new, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_too_few_files_that_may_be_opened(old, tmp_path):
    sj.save(old, tmp_path / "m")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with pytest.raises(ValueError, match=r"may open 64 files .* raise the limit, such as with ulimit -n 1024"):
            sj.save(old, tmp_path / "m")
        with pytest.raises(ValueError, match=r"may open 64 files"):
            sj.load(tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert same(sj.load(tmp_path / "m"), old)


def test_what_stands_in_the_way_is_said(old, tmp_path):
    (tmp_path / "file").write_text("words")
    with pytest.raises(ValueError, match=r"file was not saved: there is a file of that name"):
        sj.save_hf(old, tmp_path / "file")
    with pytest.raises(ValueError, match=r"was not saved: "):
        sj.save_hf(old, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "words"
