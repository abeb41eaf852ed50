"""Paths as users write them."""

from pathlib import Path

import pytest

from streamjax.checkpoints import user_path

pytestmark = pytest.mark.quick


def test_home_folders_are_put_in(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_path("~/x") == Path("/home/somebody/x")
    assert user_path(Path("~/x")) == Path("/home/somebody/x")
    assert user_path("a/~/x") == Path("a/~/x")
    assert user_path("./~x") == Path("~x")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "~nobody-of-this-name"])
def test_a_home_that_nobody_has_is_one_line(name):
    with pytest.raises(ValueError, match=rf"^{name}: no home folder is known for ~nobody-of-this-name \("):
        user_path(name)


@pytest.mark.parametrize("name", ["gs://bucket/run", "s3://bucket", "file:///tmp/run"])
def test_an_address_is_no_folder(name):
    with pytest.raises(ValueError, match=rf"^{name} is an address, .*: mount what .*:// leads to as a folder"):
        user_path(name)
