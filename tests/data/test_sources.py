"""Document sources: text files, the built-in corpus, prepared TFDS datasets, and what goes wrong with each."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamjax.data import DocumentSource, builtin_corpus, corpus_documents, open_source
from streamjax.data import sources as sources_module

pytestmark = pytest.mark.quick


def _texts(source: DocumentSource) -> list[str]:
    return [source[index] for index in range(len(source))]


def _folder(root: Path, count: int) -> dict[str, str]:
    """Text files in two levels of folders; name to content."""
    texts = {f"part{index % 7}/doc{index}.txt": f"document {index}\nwith é\n" for index in range(count)}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return texts


def test_folder_and_globs(tmp_path: Path) -> None:
    texts = _folder(tmp_path, 200)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("not this")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "windows.md").write_bytes(b"one\r\ntwo\r\n")
    splits = {}
    for split in ("train", "validation", "test"):
        splits[split] = _texts(open_source(str(tmp_path), split))
        assert splits[split] == _texts(open_source(f"text:{tmp_path}", split))
    assert sorted(itertools.chain.from_iterable(splits.values())) == sorted([*texts.values(), "one\ntwo\n"])
    assert len(splits["train"]) > 150
    assert len(splits["validation"]) > 2
    # The same files in the same splits, however they are named, and wherever the folder lies.
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.copytree(tmp_path, moved)
    for spec in (f"text:{tmp_path}/**/*.txt", f"{moved}/**/*.txt"):
        assert _texts(open_source(spec, "test")) == [text for text in splits["test"] if text.startswith("document")]
    assert len(open_source(f"{tmp_path}/part3/*.txt", "train")) < 30


def test_splits_stay_when_files_are_added(tmp_path: Path) -> None:
    _folder(tmp_path, 100)
    before = {split: set(_texts(open_source(str(tmp_path), split))) for split in ("train", "validation", "test")}
    _folder(tmp_path, 150)
    for split, texts in before.items():
        assert texts <= set(_texts(open_source(str(tmp_path), split)))


def test_a_few_files_still_have_validation(tmp_path: Path) -> None:
    texts = _folder(tmp_path, 2)
    train, validation = (_texts(open_source(str(tmp_path), split)) for split in ("train", "validation"))
    assert len(train) == len(validation) == 1
    assert sorted(train + validation) == sorted(texts.values())
    with pytest.raises(ValueError, match="none of its 2 files has text for the split 'test'"):
        open_source(str(tmp_path), "test")


def test_a_lone_file_keeps_its_tail_for_validation(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    lines = [f"line {index} é\n" for index in range(1_000)]
    file.write_text("".join(lines), encoding="utf-8")
    [train], [validation] = (_texts(open_source(str(file), split)) for split in ("train", "validation"))
    assert train + validation == "".join(lines)
    assert validation.startswith("line ")
    assert 0.04 < len(validation) / len(train) < 0.06
    with pytest.raises(ValueError, match="one file, which has no 'test' split"):
        open_source(str(file), "test")


LETTERS = st.sampled_from(["a", "é", "東", "😀"])
LINES = st.sampled_from(["a", "é", "東", "😀", "\n", "line\n"])


@settings(max_examples=60)
@given(st.one_of(st.lists(LETTERS, max_size=80), st.lists(LINES, max_size=80)), st.integers(4, 40))
def test_long_files_come_in_pieces_of_whole_characters(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], piece_bytes: int
) -> None:
    file = tmp_path_factory.mktemp("long") / "x.txt"
    file.write_text("".join(parts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sources_module, "_PIECE_BYTES", piece_bytes)
        pieces = _texts(sources_module.FileSource(sources_module._pieces(file, 0, file.stat().st_size)))
    assert "".join(pieces) == "".join(parts)
    for piece in pieces[:-1]:
        assert len(piece.encode()) >= piece_bytes
        assert piece.endswith("\n") or "\n" not in "".join(parts)[len(piece) :]


def test_builtin(corpus_dir: Path) -> None:
    expected = [text for _, text in corpus_documents("validation", corpus_dir)]
    assert _texts(open_source("builtin", "validation", data_dir=corpus_dir)) == expected
    assert len(open_source("builtin/with_tests", "test", data_dir=corpus_dir)) >= len(
        open_source("builtin", "test", data_dir=corpus_dir)
    )


def test_tfds(corpus_dir: Path, tmp_path: Path) -> None:
    builder = builtin_corpus(corpus_dir)
    root = Path(builder.data_dir_root)
    expected = list(corpus_documents("test", corpus_dir))
    assert _texts(open_source("tfds:stdlib_corpus/stdlib", "test", data_dir=root)) == [text for _, text in expected]
    names = open_source("tfds:stdlib_corpus", "test[:3]", text_key="name", data_dir=root)
    assert _texts(names) == [name for name, _ in expected[:3]]
    with pytest.raises(ValueError, match="no feature 'content': set text_key to one of name, text"):
        open_source("tfds:stdlib_corpus", "test", text_key="content", data_dir=root)
    with pytest.raises(ValueError, match="no split 'dev': it has train, validation, test"):
        open_source("tfds:stdlib_corpus", "dev", data_dir=root)
    with pytest.raises(ValueError, match="no prepared TFDS dataset 'nowhere/at_all'"):
        open_source("tfds:nowhere/at_all", "train", data_dir=root)
    shutil.copytree(root / "stdlib_corpus", tmp_path / "stdlib_corpus")
    info = tmp_path / "stdlib_corpus" / "stdlib" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="without random access"):
        open_source("tfds:stdlib_corpus", "test", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["folder", "folder/*"])
def test_what_is_no_file_is_passed_over(tmp_path: Path, name: str) -> None:
    """Opening a pipe would wait for its writer for ever."""
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "nowhere").symlink_to("nothing")
    (folder / "text.txt").write_text("some text\n" * 50)
    assert list(open_source(str(tmp_path / name), "train")) == ["some text\n" * 48]


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"text\0\0")
    (tmp_path / "empty").mkdir()
    cases = {
        "text:/nowhere/**/*.txt": "no text files match /nowhere",
        str(tmp_path / "empty"): "no text files match",
        "bultin": "data source 'bultin': use",
        "": "data source '': use",
        str(tmp_path / "binary.txt"): "is not UTF-8 text",
        str(tmp_path / "*.txt"): "is not UTF-8 text",
        "builtin/nonsense": "use one of stdlib, with_tests",
    }
    for spec, message in cases.items():
        with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
            open_source(spec, "train")
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="unknown split 'dev': use one of train, validation, test"):
        open_source("builtin", "dev")
