"""The repository's address is stated once; what repeats it says the same."""

import re
import shutil

import pytest

from docs import address
from docs.address import ROOT, phrases, set_everywhere, stated

OTHER = "https://github.com/some-body/stream.jax"


def files(root):
    return [
        path for pattern in dict.fromkeys(pattern for pattern, _ in address.REPEATED) for path in root.glob(pattern)
    ]


@pytest.fixture
def copy(tmp_path):
    (tmp_path / "colab").mkdir()
    for path in files(ROOT):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


def test_all_files_name_the_address_that_is_stated():
    for pattern, words in phrases(stated()):
        found = list(ROOT.glob(pattern))
        assert found
        assert all(words in path.read_text(encoding="utf-8") for path in found)


def test_it_is_set_everywhere_and_back(copy):
    before = {path: path.read_bytes() for path in files(copy)}
    name = stated().removeprefix("https://github.com/")
    assert len(before) == 8
    assert set_everywhere(stated(), copy) == []
    assert {*set_everywhere(OTHER, copy)} == {*before}
    assert stated(copy) == OTHER
    assert not [path for path in before if re.search(rf"{re.escape(name)}\b", path.read_text(encoding="utf-8"))]
    assert set_everywhere(stated(), copy)
    assert {path: path.read_bytes() for path in before} == before


def test_a_file_that_lost_it_is_named_and_nothing_is_written(copy):
    (copy / "colab" / "recall.ipynb").write_text("{}")
    before = {path: path.read_bytes() for path in files(copy)}
    with pytest.raises(ValueError, match=r"^colab/recall\.ipynb lacks os\.environ"):
        set_everywhere(OTHER, copy)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "wrong", ["", "github.com/a/b", "https://github.com/a", "https://github.com/a/b.git", 'https://github.com/a/b"']
)
def test_what_is_no_address_is_refused(wrong, copy):
    with pytest.raises(ValueError, match=r"is no address like https://github\.com/OWNER/NAME$"):
        set_everywhere(wrong, copy)
