"""The built-in corpus: what is in it, that its splits and hash are recorded, that preparing it is all or nothing."""

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamjax.data import StdlibCorpus, builtin_corpus, corpus_documents, corpus_text, default_data_dir
from streamjax.data.stdlib_corpus import SPLITS, documents_sha256, split_of, stdlib_documents

pytestmark = pytest.mark.quick


def _write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def test_split_depends_on_the_name_alone() -> None:
    # Pinned: a model card's "held out" holds only while names keep their splits.
    names = ["subprocess.py", "enum.py", "argparse.py", "json/encoder.py", "pydoc_data/topics/typesmapping", "ast.py"]
    assert [split_of(name) for name in names] == ["test", "test", "train", "test", "test", "train"]
    splits = [split_of(f"folder/{index}.py") for index in range(20_000)]
    assert 0.09 < splits.count("test") / 20_000 < 0.11
    assert 0.04 < splits.count("validation") / 20_000 < 0.06
    assert split_of("x", {"test": 1.0}) == "test"


def test_documents_of_a_library(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "os.py": b"import sys\r\nx = 1\r\n",
            "latin.py": "# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"),
            "broken.py": b"x = '\xff\xfe'\n",
            "empty.py": b"",
            "notes.txt": b"no source",
            "_sysconfigdata__linux.py": b"build = 'of one machine'\n",
            "json/__init__.py": b"'''JSON'''\n",
            "json/tests/test_it.py": b"test\n",
            "encodings/cp1252.py": b"table\n",
            "site-packages/other.py": b"not ours\n",
            "idlelib/idle.py": b"elsewhere on some systems\n",
            "test/test_os.py": b"import os\n",
            "test/tests/deep.py": b"deep = 1\n",
            "test/__pycache__/x.py": b"no\n",
            "pydoc_data/topics.py": b"# generated\ntopics = {'if': '\\nThe \"if\"\\nstatement\\n\\n', 'for': 'Loop'}\n",
        },
    )
    documents = dict(stdlib_documents(root=tmp_path))
    assert documents == {
        "json/__init__.py": "'''JSON'''\n",
        "latin.py": "# -*- coding: latin-1 -*-\nname = 'é'\n",
        "os.py": "import sys\nx = 1\n",
        "pydoc_data/topics/for": "Loop\n",
        "pydoc_data/topics/if": 'The "if"\nstatement\n',
    }
    assert list(documents) == sorted(documents)
    more = dict(stdlib_documents(with_tests=True, root=tmp_path))
    assert set(more) - set(documents) == {"test/test_os.py", "test/tests/deep.py"}
    with pytest.raises(ValueError, match="no Python source"):
        list(stdlib_documents(root=tmp_path / "json" / "nowhere"))


def test_prepared_corpus(corpus_dir: Path) -> None:
    builder = builtin_corpus(corpus_dir)
    documents = {split: list(corpus_documents(split, corpus_dir)) for split in SPLITS}
    assert builder.info.splits["train"].num_examples == len(documents["train"])
    for split in SPLITS:
        assert [name for name, _ in documents[split]] == sorted(name for name, _ in documents[split])
        assert {split_of(name) for name, _ in documents[split]} == {split}
        text = corpus_text(split, corpus_dir)
        assert text == "".join(text for _, text in documents[split])
        assert len(text.encode()) == builder.info.metadata["bytes"][split]
    everything = sorted(itertools.chain.from_iterable(documents.values()))
    assert [name for name, _ in everything] == sorted({name for name, _ in everything})
    digest = hashlib.sha256(b"".join(f"{name}\0{text}\0".encode() for name, text in everything)).hexdigest()
    assert builder.info.metadata["sha256"] == digest == documents_sha256(stdlib_documents())
    assert builder.info.metadata["python_version"] == sys.version.split()[0]
    assert builder.info.metadata["bytes"]["test"] >= 600_000
    assert builder.info.metadata["bytes"]["validation"] >= 100_000
    assert dict(everything)["subprocess.py"] == Path(subprocess.__file__).read_text(encoding="utf-8")


def test_prepared_once_and_recorded_on_disk(corpus_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = builtin_corpus(corpus_dir)
    monkeypatch.setattr(StdlibCorpus, "_generate_examples", None)
    again = builtin_corpus(corpus_dir)
    assert again.data_dir == builder.data_dir
    assert json.loads((Path(again.data_dir) / "metadata.json").read_text())["sha256"] == again.info.metadata["sha256"]


def test_with_tests_holds_out_the_same(corpus_dir: Path) -> None:
    if not (Path(subprocess.__file__).parent / "test" / "test_os.py").exists():
        pytest.skip("this Python comes without its tests")
    held_out = {name for name, _ in corpus_documents("test", corpus_dir)}
    trained = {name for name, _ in corpus_documents("train", corpus_dir, config="with_tests")}
    assert not held_out & trained
    assert any(name.startswith("test/") for name in trained)


def _on_second_example(monkeypatch: pytest.MonkeyPatch, before: Callable[[], Any]) -> None:
    """Makes the generation of examples call `before` when it has begun."""
    generate = StdlibCorpus._generate_examples

    def interrupted(self: StdlibCorpus, documents: Any) -> Any:
        for index, example in generate(self, documents):
            if index == 1:
                before()
            yield index, example

    monkeypatch.setattr(StdlibCorpus, "_generate_examples", interrupted)


def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        _on_second_example(patched, interrupt)
        with pytest.raises(KeyboardInterrupt):
            builtin_corpus(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert builtin_corpus(tmp_path).info.metadata["documents"] > 100


def test_a_race_leaves_one_whole_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def other_process() -> None:
        if not started:
            started.append(True)
            builtin_corpus(tmp_path)

    _on_second_example(monkeypatch, other_process)
    builder = builtin_corpus(tmp_path)
    assert started
    assert len(list(tmp_path.iterdir())) == 1
    documents = sum(split.num_examples for split in builder.info.splits.values())
    assert documents == builder.info.metadata["documents"]


def test_unknown_config_and_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="use one of stdlib, with_tests"):
        builtin_corpus(config="nonsense")
    monkeypatch.setenv("STREAMJAX_DATA_DIR", "~/data")
    assert default_data_dir() == Path.home() / "data"
    monkeypatch.delenv("STREAMJAX_DATA_DIR")
    assert default_data_dir() == Path.home() / ".cache" / "streamjax"


def test_needs_no_tensorflow_and_prints_nothing(tmp_path: Path) -> None:
    program = f"""
import sys
from streamjax.data import DataConfig, make_train_iterator
batch = next(make_train_iterator(DataConfig(data_dir={str(tmp_path)!r}, seq_len=64, batch_size=2)))
assert batch["tokens"].shape == (2, 64)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
