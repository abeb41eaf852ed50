"""The built-in corpus: text that every CPython carries, as a TFDS dataset that needs no download and no TensorFlow.

A document is one source file of the standard library, or one topic of `pydoc_data/topics.py` (English prose about the
language). What operating systems leave out of their Python packages, or keep elsewhere, is left out here too, so that
one Python version gives one corpus nearly everywhere: tests, idlelib, tkinter, turtledemo, lib2to3, distutils,
ensurepip and venv; so are the `encodings`, which are mostly tables. The configuration "with_tests" adds the package
`test`, three times the text, where it is installed.

A document's split depends on its name alone, so a file held out in one Python version, or in one configuration, is held
out in all. The dataset's info holds the SHA-256 of all names and texts, and the Python version.
"""

import ast
import contextlib
import hashlib
import io
import os
import platform
import sys
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
import tqdm

from streamjax.checkpoints import user_path
from streamjax.data.prepared_corpora import PreparedExamples, check_metadata

SPLITS = ("train", "validation", "test")
_HELD_OUT = {"test": 0.10, "validation": 0.05}  # shares of the documents; of 8 MB, a tenth is enough to stream for long

_NOT_EVERYWHERE = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "venv"}
_NOT_TEXT = {"__pycache__", "__phello__", "encodings", "lib-dynload", "pydoc_data"}
_NOT_PYTHON = {"dist-packages", "site-packages"}
_SKIPPED_FOLDERS = _NOT_EVERYWHERE | _NOT_TEXT | _NOT_PYTHON | {"test", "tests", "idle_test"}
_TOPICS = "pydoc_data/topics.py"


def split_of(name: str, held_out: dict[str, float] | None = None) -> str:
    """The split of a document, decided by a hash of its name: stable when other documents come and go.

    Args:
      name: the document's name, with "/" between folders.
      held_out: share of the documents by split; the rest is "train". Default: the built-in corpus's.
    """
    point = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big") / 2**64
    for split, share in (_HELD_OUT if held_out is None else held_out).items():
        if point < share:
            return split
        point -= share
    return "train"


def stdlib_documents(with_tests: bool = False, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the standard library's documents, sorted by name; text has "\\n" line ends.

    Files that do not decode by their own coding declaration are passed over.

    Args:
      with_tests: whether to include the package `test`.
      root: the standard library's folder; the running Python's by default.

    Raises:
      ValueError: there is no source there, as in Pythons that ship bytecode only.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents: dict[str, str] = {}
    for name in _source_names(root, with_tests):
        text = _read_source(root / name)
        if text:
            documents[name] = text
    if not documents:
        raise ValueError(f"no Python source of the standard library under {root}: use another corpus or another Python")
    topics = _read_source(root / _TOPICS)
    for topic, text in _topics(topics).items():
        documents[f"pydoc_data/topics/{topic}"] = text.strip() + "\n"
    yield from sorted(documents.items())


def documents_sha256(documents: Iterable[tuple[str, str]]) -> str:
    """SHA-256, in hex, over the UTF-8 of every name and text in order, each closed by a zero byte."""
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(name.encode("utf-8") + b"\0" + text.encode("utf-8") + b"\0")
    return digest.hexdigest()


class StdlibCorpus(tfds.core.GeneratorBasedBuilder):
    """CPython's own source and documentation topics."""

    code_path = None  # no files beside the code; to look for them TFDS needs a package that it does not require
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar[list[Any]] = [
        tfds.core.BuilderConfig(name="stdlib", description="The standard library without its tests."),
        tfds.core.BuilderConfig(name="with_tests", description="The standard library and the package `test`."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source files of CPython's standard library and the topics of its help().",
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
            homepage="https://www.python.org/",
            license="PSF-2.0",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # keeps the order of the names
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        documents = list(stdlib_documents(self.builder_config.name == "with_tests"))
        self.info.metadata.update(
            sha256=documents_sha256(documents),
            python_version=platform.python_version(),
            documents=len(documents),
            bytes={
                split: sum(len(text.encode("utf-8")) for name, text in documents if split_of(name) == split)
                for split in SPLITS
            },
        )
        return {
            split: self._generate_examples([document for document in documents if split_of(document[0]) == split])
            for split in SPLITS
        }

    def _generate_examples(self, documents: Sequence[tuple[str, str]]) -> Iterator[tuple[int, dict[str, str]]]:
        progress = tqdm.tqdm(documents, desc="corpus", unit=" documents", leave=False, disable=None)
        for index, (name, text) in enumerate(progress):
            yield index, {"name": name, "text": text}


def default_data_dir() -> Path:
    """Where prepared data is kept: the environment's STREAMJAX_DATA_DIR, or `~/.cache/streamjax`."""
    return Path(os.environ.get("STREAMJAX_DATA_DIR") or Path.home() / ".cache" / "streamjax").expanduser()


def builtin_corpus(data_dir: str | Path | None = None, *, config: str = "stdlib") -> StdlibCorpus:
    """The prepared built-in corpus; prepared now (seconds) if this Python has not done so yet.

    It is prepared in a folder of its own, which is then renamed: processes that race each other, and one that is
    interrupted, leave a whole corpus or none.

    Args:
      data_dir: where it is kept; `default_data_dir()` by default.
      config: "stdlib", or "with_tests" for three times the text.

    Raises:
      ValueError: an unknown `config`, a Python without its source, or a prepared corpus that is damaged.
    """
    if config not in StdlibCorpus.builder_configs:
        raise ValueError(f"unknown built-in corpus {config!r}: use one of {', '.join(StdlibCorpus.builder_configs)}")
    root = default_data_dir() if data_dir is None else user_path(data_dir)
    interpreter = hashlib.sha256(f"{sys.version} {sysconfig.get_paths()['stdlib']}".encode()).hexdigest()[:8]
    final = root / f"cpython-{platform.python_version()}-{interpreter}-{config}"
    if not final.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=root, ignore_cleanup_errors=True) as scratch:
            _prepare(Path(scratch) / "data", config)
            try:
                os.rename(Path(scratch) / "data", final)
            except OSError:
                if not final.exists():  # else another process was first, with the same content
                    raise
    check_metadata(final / StdlibCorpus.name / config / str(StdlibCorpus.VERSION), _repair(final))
    return StdlibCorpus(data_dir=final, config=config, file_format="array_record")


def builtin_examples(split: str, data_dir: str | Path | None = None, *, config: str = "stdlib") -> PreparedExamples:
    """The examples of one split of the built-in corpus, which has "name" and "text", prepared if it is not yet."""
    builder = builtin_corpus(data_dir, config=config)
    folder = Path(builder.data_path).parents[2]
    return PreparedExamples(builder, split, ("name", "text"), _repair(folder))


def _repair(folder: Path) -> str:
    return f"delete {folder}, and it is prepared again"


def corpus_documents(
    split: str, data_dir: str | Path | None = None, *, config: str = "stdlib"
) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the built-in corpus's documents in one split, sorted by name."""
    examples = builtin_examples(split, data_dir, config=config)
    for index in range(len(examples)):
        yield examples[index]["name"].decode("utf-8"), examples[index]["text"].decode("utf-8")


def corpus_text(split: str, data_dir: str | Path | None = None, *, config: str = "stdlib") -> str:
    """All text of one split of the built-in corpus, its documents in order of their names."""
    return "".join(text for _, text in corpus_documents(split, data_dir, config=config))


def _prepare(data_dir: Path, config: str) -> None:
    builder = StdlibCorpus(data_dir=data_dir, config=config, file_format="array_record")
    tfds.disable_progress_bar()  # TFDS shows a bar a step and prints of downloads; the bar above is enough
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    finally:
        tfds.enable_progress_bar()


def _source_names(root: Path, with_tests: bool) -> list[str]:
    """Relative names of the source files to take."""
    names = []
    for folder, subfolders, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        skipped = _SKIPPED_FOLDERS - ({"test"} if with_tests and inside == Path() else set())
        if with_tests and inside.parts[:1] == ("test",):
            skipped = skipped & {"__pycache__"}
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith("config-")]
        names += [
            (inside / name).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return names


def _read_source(file: Path) -> str:
    """The text of a source file with "\\n" line ends; "" if it is missing or does not decode."""
    with contextlib.suppress(OSError, SyntaxError, UnicodeDecodeError), tokenize.open(file) as stream:
        return stream.read()
    return ""


def _topics(source: str) -> dict[str, str]:
    """The dictionary that `pydoc_data/topics.py` assigns, read without running it."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            return ast.literal_eval(statement.value)
    return {}
