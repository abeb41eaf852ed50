"""Small files that are replaced whole, or not at all."""

import os
from pathlib import Path

import pytest

from streamjax.checkpoints import replace_text

pytestmark = pytest.mark.quick


def test_a_file_is_made_and_replaced(tmp_path):
    file = tmp_path / "notes.json"
    for text in ("one\n", "naïve 東京\n", ""):
        replace_text(file, text)
        assert file.read_bytes() == text.encode()
        assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("where", ["write_bytes", "replace"])
def test_what_stood_there_stays_whole_where_the_new_text_cannot_be_written(tmp_path, monkeypatch, where):
    """Half of the text is written and the disk is full; or all of it is, and the name cannot be taken."""
    file = tmp_path / "notes.json"
    file.write_text("old")

    def half(self, data):
        with self.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    def refuse(source, target):
        raise OSError(30, "Read-only file system")

    owner, stand_in = (Path, half) if where == "write_bytes" else (os, refuse)
    monkeypatch.setattr(owner, where, stand_in)
    with pytest.raises(OSError, match=r"No space|Read-only"):
        replace_text(file, "a new and longer text")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
