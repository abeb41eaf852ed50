"""Pictures on disk: under the name that was given, in the format that it says, whole or not at all."""

import os

import pytest
from matplotlib.figure import Figure

from streamjax.checkpoints import text_files
from streamjax.evaluation.pictures import FORMATS, picture_format, save_picture


@pytest.mark.parametrize(
    ("name", "begins"),
    [("p.png", b"\x89PNG"), ("p", b"\x89PNG"), ("new/p.PNG", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.pdf", b"%PDF")],
)
def test_a_picture_has_the_name_that_was_given(tmp_path, name, begins):
    save_picture(Figure(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / name]


def test_every_format_can_be_drawn(tmp_path):
    for name in FORMATS:
        save_picture(Figure(figsize=(1, 1)), tmp_path / f"p.{name}")
        assert (tmp_path / f"p.{name}").stat().st_size > 50


def test_another_ending_is_one_line():
    with pytest.raises(
        ValueError, match=r"^out/p\.json: no format of pictures is called 'json'; end the name in \.png"
    ):
        picture_format("out/p.json")


def test_a_full_device_is_an_error_and_gets_no_neighbour():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        save_picture(Figure(), "/dev/full")
    assert not os.path.lexists("/dev/full.png")


def test_the_old_picture_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "p.png").write_bytes(b"old")

    def refuse(source, target):
        raise OSError(28, os.strerror(28), str(source))

    monkeypatch.setattr(text_files.os, "replace", refuse)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/p\.png'"):
        save_picture(Figure(), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]
