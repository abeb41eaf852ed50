"""Saved streams and sessions with changes that chance has made: they load as they were saved, or are refused."""

import gc
import json
import random
import sys

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.commands.conftest import model_folder  # noqa: F401  (a fixture)
from tests.fuzz.mutations import draws, mutate_bytes, mutate_json, read_or_refused

CACHE = sj.kv.preset("streaming_llm", sinks=2, window=6)
MANIFEST = "checksums.json"
METADATA = ("about/metadata", "arrays/_METADATA", "arrays/array_metadatas/process_0", "_CHECKPOINT_METADATA")


@pytest.fixture(params=["stream", "session"])
def saved(model_folder, tmp_path, request):  # noqa: F811
    """A folder, its reader, which returns the arrays, and the arrays that it has to return."""
    model, folder = sj.load(model_folder), tmp_path / "saved"
    session = sj.Session(model, sj.load_tokenizer(), CACHE, chunk_size=8)
    session.read("It was the best")
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(session.state)]
    if request.param == "stream":
        sj.save_stream(session.state, folder)
        like = session.state
        return folder, lambda: jax.tree.leaves(sj.load_stream(folder, like)), expected
    session.save(folder)

    def read():
        session.reset()
        try:
            session.load(folder)
        except ValueError:
            assert session.tokens_seen == 0
            raise
        session.pending()
        return jax.tree.leaves(session.state)

    return folder, read, expected


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def assert_saved(found, expected, note):
    for leaf, value in zip(found, expected, strict=True):
        np.testing.assert_array_equal(leaf, value, err_msg=str(note))


def change_files(folder, rng):
    """One change of one file, or of two that change places; returns the contents to put back, and what was done."""
    files = files_of(folder)
    file = rng.choice(files)
    data = file.read_bytes()
    match rng.randrange(8):
        case 0:
            file.unlink()
            return {file: data}, f"{file} removed"
        case 1:
            other = rng.choice(files)
            before = {file: data, other: other.read_bytes()}
            file.write_bytes(before[other])
            other.write_bytes(data)
            return before, f"{file} and {other} swapped"
    changed = mutate_bytes(data, rng)
    file.write_bytes(changed)
    return {file: data}, f"{file} is {changed[:300]!r}"


def put_back(before):
    """Whether anything had been changed."""
    changed = any(not file.exists() or file.read_bytes() != data for file, data in before.items())
    for file, data in before.items():
        file.write_bytes(data)
    return changed


@pytest.fixture
def ignored(monkeypatch):
    """What Python would write of errors that nobody can be told: a traceback each, on stderr."""
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: ignored.append(repr(unraisable)))
    return ignored


@draws(25)
def test_with_checksums_every_change_is_refused(saved, draws):
    folder, read, expected = saved
    (folder / "notes.txt").write_text("nobody's business")
    rng = random.Random(0)
    for draw in range(draws):
        before, note = change_files(folder, rng)
        found, _ = read_or_refused(read, (draw, note))
        if found is not None:
            assert_saved(found, expected, (draw, note))
        changed = put_back(before)
        listed = any(file.name not in (MANIFEST, "notes.txt") for file in before)
        assert found is None or not (changed and listed), (draw, note)
    assert_saved(read(), expected, "as it was")


@pytest.mark.usual("session-8")
@draws(8, 200)
def test_without_checksums_a_changed_file_is_read_or_refused_in_one_line(saved, draws, ignored, capfd):
    """What is read may have other numbers then: the arrays' bytes have no checksums of their own."""
    folder, read, expected = saved
    (folder / MANIFEST).unlink()
    rng = random.Random(1)
    refused = 0
    for draw in range(draws):
        before, note = change_files(folder, rng)
        refused += read_or_refused(read, (draw, note))[0] is None
        put_back(before)
    assert refused
    assert_saved(read(), expected, "as it was")
    gc.collect()
    assert ignored == []
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.usual("session-8")
@draws(8, 200)
def test_without_checksums_changed_metadata_change_no_number(saved, draws, ignored):
    folder, read, expected = saved
    (folder / MANIFEST).unlink()
    rng = random.Random(2)
    loaded, files = 0, [file for file in map(folder.joinpath, METADATA) if file.exists()]  # Orbax's differ by version
    for draw in range(draws):
        file = rng.choice(files)
        whole = file.read_text()
        changed = json.dumps(mutate_json(json.loads(whole), rng))
        file.write_text(changed)
        found, _ = read_or_refused(read, (draw, file.name, changed))
        file.write_text(whole)
        if found is not None:
            loaded += 1
            assert_saved(found, expected, (draw, file.name, changed))
    assert 0 < loaded < draws
    gc.collect()
    assert ignored == []


@pytest.mark.parametrize("field", ["caches", "kind", "name", "dtype"])
def test_words_of_the_metadata_make_no_second_line(saved, field):
    folder, read, _ = saved
    (folder / MANIFEST).unlink()
    file = folder / METADATA[0]
    about = json.loads(file.read_text())
    match field:
        case "caches":
            about["caches"] = ["two\nlines"]
        case "kind":
            about["kind"] = "two\nlines"
        case "name":
            about["arrays"]["two\nlines"] = ["float32", 1]
        case "dtype":
            about["arrays"]["position"] = ["two\nlines", 1]
    file.write_text(json.dumps(about))
    _, message = read_or_refused(read, field)
    assert "two lines" in message
