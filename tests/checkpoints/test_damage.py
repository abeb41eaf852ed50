"""Damaged checkpoints: whatever bit, byte or file is wrong, it is one line that names it, and never other values."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.checkpoints import DamagedFile, RunCheckpoints, restore_pytree, runs, save_pytree

TREE = {"weights": jnp.arange(3000.0).reshape(30, 100), "step": jnp.int32(7), "key": jnp.array([1, 2], jnp.uint32)}
EMPTY = jax.tree.map(jnp.zeros_like, TREE)


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def same_bits(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def refused(folder, read=lambda folder: restore_pytree(EMPTY, folder)):
    with pytest.raises(ValueError, match=r".") as caught:
        read(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "tree"
    save_pytree(TREE, path, {"kind": "pytree", "note": "a dictionary"})
    return path


@pytest.fixture
def copied(good, tmp_path):
    return shutil.copytree(good, tmp_path / "tree")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_never_another_value(good, data):
    file = data.draw(st.sampled_from(files_of(good)))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    before = bytes(content)
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    message = str(good)
    try:
        assert same_bits(restore_pytree(EMPTY, good), TREE)
    except ValueError as error:
        message = str(error)
    finally:
        file.write_bytes(before)
    assert str(good) in message
    assert "\n" not in message


def test_every_file_that_is_cut_emptied_replaced_or_missing_is_named(good, tmp_path):
    def pipe(file):
        file.unlink()
        os.mkfifo(file)

    def folder(file):
        file.unlink()
        file.mkdir()

    def device(file):
        file.unlink()
        file.symlink_to("/dev/zero")

    damages = (
        lambda file: file.unlink(),
        lambda file: os.truncate(file, file.stat().st_size // 2),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes() + b"\n"),
        *(pipe, folder, device),
    )
    for index, file in enumerate(files_of(good)):
        for number, damage in enumerate(damages):
            if file.name == "checksums.json" and damage in (damages[0], damages[3]):
                continue  # without it nothing is checked; and a blank line changes nothing in it
            path = shutil.copytree(good, tmp_path / f"{index}-{number}")
            damage(path / file.relative_to(good))
            assert file.name in refused(path)
            shutil.rmtree(path)


def test_metadata_that_says_something_else_is_not_believed(copied):
    file = copied / "about" / "metadata"
    file.write_text(file.read_text().replace("dictionary", "dictionarz"))
    assert "metadata has changed since it was saved" in refused(copied)


@pytest.mark.parametrize("content", ["[]", "{", '{"arrays": 3}', '{"arrays": {"step": ["int32", "x"]}}', "[" * 100_000])
def test_metadata_of_an_older_save_is_checked_as_json(copied, content):
    (copied / "checksums.json").unlink()
    assert same_bits(restore_pytree(EMPTY, copied), TREE)
    (copied / "about" / "metadata").write_text(content)
    assert "metadata" in refused(copied)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "d"])
def test_what_orbax_stumbles_over_is_one_line(copied, name):
    (copied / "checksums.json").unlink()
    found = next(copied.rglob(name))
    shutil.rmtree(found) if found.is_dir() else os.truncate(found, 0)
    assert "is damaged, its arrays cannot be read" in refused(copied)


def test_a_users_own_files_do_no_harm_and_stay(copied):
    (copied / "README.md").write_text("mine")
    (copied / "notes").mkdir()
    (copied / "notes" / "a.txt").write_text("mine too")
    assert same_bits(restore_pytree(EMPTY, copied), TREE)
    save_pytree(EMPTY, copied)
    assert (copied / "README.md").read_text() == "mine"
    assert (copied / "notes" / "a.txt").read_text() == "mine too"
    (copied / "README.md").write_text("mine, changed")
    assert same_bits(restore_pytree(TREE, copied), EMPTY)


def test_checks_can_be_switched_off(copied, monkeypatch):
    listed = json.loads((copied / "checksums.json").read_text())
    for entry in listed["files"].values():
        entry["sha256"] = "0"
    (copied / "checksums.json").write_text(json.dumps(listed))
    refused(copied)
    monkeypatch.setenv("STREAMJAX_VERIFY", "0")
    assert same_bits(restore_pytree(EMPTY, copied), TREE)


ENTRY = {"bytes": 1, "sha256": ""}


@pytest.mark.parametrize("files", [{"../x": ENTRY}, {"/etc/passwd": ENTRY}, {"a": 3}, {"a": ENTRY | {"bytes": True}}])
def test_a_manifest_that_makes_no_sense_is_refused(copied, files):
    (copied / "checksums.json").write_text(json.dumps({"format": 1, "files": files}))
    assert "its entry of" in refused(copied)


@pytest.mark.parametrize("put_off", [False, True])
def test_a_run_goes_on_from_the_step_before_a_damaged_one(tmp_path, put_off, monkeypatch):
    if put_off:
        monkeypatch.setattr("jax.default_backend", lambda: "gpu")  # where saves are written behind the next steps
    checkpoints = RunCheckpoints(tmp_path / "run", keep=4)
    for step in (2, 4, 6, 8):
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x + s, TREE), {"step": step})
    checkpoints.close()
    checkpoints = RunCheckpoints(tmp_path / "run", keep=4)
    for step in (6, 8):
        file = max(files_of(tmp_path / "run" / str(step) / "arrays"), key=lambda file: file.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"step 8 is damaged: .*/8/arrays/.* go on .* --resume_from=4$"):
        checkpoints.restore(8, EMPTY)
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; there is 2, 4, 6, 8"):
        checkpoints.restore(3, EMPTY)
    found, about = checkpoints.restore(4, EMPTY)
    assert same_bits(found, jax.tree.map(lambda x: x + 4, TREE))
    assert about["step"] == 4
    checkpoints.set_aside_after(4)
    assert checkpoints.steps == [2, 4]
    assert sorted(path.name for path in (tmp_path / "run_set_aside").iterdir()) == ["6", "8"]
    checkpoints.save(6, TREE, {"step": 6})
    checkpoints.set_aside_after(4)
    assert sorted(path.name for path in (tmp_path / "run_set_aside").iterdir()) == ["6", "6_", "8"]
    os.truncate(tmp_path / "run" / "2" / "about" / "metadata", 5)
    os.truncate(tmp_path / "run" / "4" / "about" / "metadata", 5)
    with pytest.raises(DamagedFile, match=r"step 4 is damaged: .*metadata has 5 bytes.*; begin with --resume_from=0$"):
        checkpoints.restore(4, EMPTY)
    checkpoints.close()


@pytest.mark.parametrize("put_off", [False, True])
def test_a_step_has_its_manifest_before_its_name(tmp_path, put_off, monkeypatch):
    """A run that dies before the manifest is written has no such step."""
    if put_off:
        monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    checkpoints = RunCheckpoints(tmp_path / "run")
    checkpoints.save(2, TREE, {"step": 2})
    checkpoints.close()
    assert (tmp_path / "run" / "2" / "checksums.json").is_file()
    checkpoints = RunCheckpoints(tmp_path / "run")

    def die(*_, **__):
        raise OSError(28, "No space left on device")

    def save():
        checkpoints.save(4, TREE, {"step": 4})
        checkpoints.close()

    monkeypatch.setattr(runs, "seal", die)
    with pytest.raises(ValueError, match="was not saved: No space left on device"):
        save()
    checkpoints = RunCheckpoints(tmp_path / "run")
    assert checkpoints.steps == [2]
    assert checkpoints.latest_step == 2
    checkpoints.close()
