"""Pages on disk that were damaged, made up, or did not fit the disk: one line, and the other pages stay readable."""

import json
import os
import resource
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.checkpoints import SaveError
from streamjax.kv.pages.disk_files import PageFiles, PageLayout, PageWriter

LAYOUT = PageLayout(layers=2, kv_heads=2, head_dim=4, size=8, dtype="float32", model="a model")


def slots(count, seed):
    return [np.random.default_rng(seed + i).normal(size=(2, count, 4)).astype(np.float32) for i in range(2)]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "pages"
    writer = PageWriter(folder, LAYOUT)
    writer.append(slots(24, 0), slots(24, 9), 24)
    writer.append(slots(8, 3), slots(8, 5), 5)
    writer.close()
    return folder


def read_all(folder):
    files = PageFiles(folder)
    assert (files.tokens, files.layout) == (29, LAYOUT)
    return [files.read(layer, np.arange(4)) for layer in range(2)], [files.means(layer)[0] for layer in range(2)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_found_or_changes_nothing(good, data):
    expected = read_all(good)
    file = data.draw(st.sampled_from(sorted(good.iterdir())))
    before = file.read_bytes()
    place = data.draw(st.integers(0, 8 * len(before) - 1))
    content = bytearray(before)
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    message = str(good)
    try:
        for one, other in zip(
            *(sum(map(list, part[0]), [*part[1]]) for part in (expected, read_all(good))), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    except ValueError as error:
        message = str(error)
    finally:
        file.write_bytes(before)
    assert str(good) in message
    assert "\n" not in message


VALUES = [-1, 0, 10**9, 10**18, 10**30, 1.5, True, None, "x", [], {}, "int32", "object"]


@pytest.mark.parametrize(
    "field", ["format", "tokens", "layers", "kv_heads", "head_dim", "size", "dtype", "model", "new"]
)
def test_a_manifest_of_others_that_makes_no_sense(good, tmp_path, field):
    """Without a checksum, as before there was one: a ValueError, or pages that are damaged one by one."""
    folder = shutil.copytree(good, tmp_path / "pages")
    values = json.loads((folder / "manifest.json").read_text())
    del values["checksum"]
    (folder / "manifest.json").write_text(json.dumps(values))
    read_all(folder)
    for value in VALUES:
        (folder / "manifest.json").write_text(json.dumps(values | {field: value}))
        try:
            PageFiles(folder).read(0, np.arange(1))
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017  both outcomes are right
            assert str(folder) in str(error)  # noqa: PT017
    (folder / "manifest.json").write_text(json.dumps({name: x for name, x in values.items() if name != field}))
    if field != "new":
        with pytest.raises(ValueError, match="pages"):
            PageFiles(folder)


@pytest.mark.parametrize("name", ["manifest.json", "layer_000.pages", "layer_001.index"])
def test_what_is_no_file_is_refused_at_once(good, tmp_path, name):
    folder = shutil.copytree(good, tmp_path / "pages")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: this file is missing"):
        PageFiles(folder)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=rf"{name} is a pipe: a file is needed"):
        PageFiles(folder)


def test_a_file_that_is_cut_while_it_is_read(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "pages")
    files = PageFiles(folder)
    os.truncate(folder / "layer_000.pages", LAYOUT.page_bytes)
    assert files.read(0, np.arange(1))[0].shape == (1, 2, 8, 4)
    with pytest.raises(ValueError, match="page 2 is damaged"):
        files.read(0, np.array([2]))


@pytest.mark.parametrize("limit", [300, 1000, 1600, 2500])
def test_a_disk_that_is_full(tmp_path, limit):
    """Earlier pages stay; when there is room again, the same pages can be written."""
    writer = PageWriter(tmp_path / "pages", LAYOUT)
    writer.append(slots(8, 0), slots(8, 9), 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SaveError, match=r"not written: File too large; those of the first 8 tokens are whole"):
            writer.append(slots(40, 1), slots(40, 2), 40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert PageFiles(tmp_path / "pages").tokens == 8
    assert PageFiles(tmp_path / "pages").damaged == []
    writer.append(slots(40, 1), slots(40, 2), 40)
    writer.close()
    files = PageFiles(tmp_path / "pages")
    np.testing.assert_array_equal(files.read(1, np.array([0, 1]))[0][1], slots(40, 1)[1][:, :8])
    assert (files.tokens, files.damaged) == (48, [])
