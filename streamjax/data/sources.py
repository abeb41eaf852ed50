"""Where documents come from: the built-in corpus, text files, or a prepared TFDS dataset, all as random-access sources.

A source is what `grain.MapDataset.source` takes: a length and documents (str) by index.
"""

import glob
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import tensorflow_datasets as tfds

from streamjax.checkpoints import user_path
from streamjax.data.file_kinds import is_text, refusal
from streamjax.data.prepared_corpora import PreparedExamples, check_metadata, one_line
from streamjax.data.stdlib_corpus import SPLITS, builtin_examples, split_of

_log = logging.getLogger(__name__)
_HELD_OUT_FILES = {"test": 0.05, "validation": 0.05}
_TAIL = 0.05  # of a lone file, what is kept for validation
_PIECE_BYTES = 1 << 22  # a longer file is read as several documents


@runtime_checkable
class DocumentSource(Protocol):
    """Documents by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


class FeatureSource:
    """One text feature of a prepared TFDS dataset."""

    def __init__(self, examples: PreparedExamples, text_key: str):
        self._examples = examples
        self._text_key = text_key

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> str:
        text = self._examples[index][self._text_key]
        return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else str(text)


class Piece(NamedTuple):
    """The bytes [start, stop) of a file."""

    file: Path
    start: int
    stop: int


class FileSource:
    """Pieces of UTF-8 files, read when asked for; bytes that are no UTF-8 become U+FFFD, line ends become "\\n".

    A file that has become shorter since, or has gone, is a ValueError that names it.
    """

    def __init__(self, pieces: Sequence[Piece]):
        self._pieces = tuple(pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> str:
        piece = self._pieces[index]
        try:
            with piece.file.open("rb") as stream:
                stream.seek(piece.start)
                content = stream.read(piece.stop - piece.start)
        except OSError as error:
            raise ValueError(f"{piece.file} cannot be read any more: {error.strerror or error}") from error
        if len(content) < piece.stop - piece.start:
            raise ValueError(f"{piece.file} has become shorter while it was read: it ended behind byte {piece.stop}")
        return content.decode("utf-8", errors="replace").replace("\r\n", "\n")


def open_source(
    spec: str, split: str = "train", *, text_key: str = "text", data_dir: str | Path | None = None
) -> DocumentSource:
    """The documents of one split.

    Args:
      spec: "builtin" (CPython's own text; "builtin/with_tests" for more of it), "text:" and a file, folder or glob
        ("**" goes through folders) of UTF-8 text, or "tfds:" and the name of a TFDS dataset that was prepared as
        ArrayRecord. A file, folder or glob that exists needs no "text:".
      split: "train", "validation" or "test"; TFDS split names and slices too ("train[:1%]") for "tfds:".
      text_key: the text feature of a TFDS dataset.
      data_dir: where the built-in corpus or the TFDS dataset is kept; the usual places by default.

    Text files fall into splits by a hash of their path below the folder or the fixed part of the glob: 90% train, 5%
    validation, 5% test; of several files at least one is for validation. Of a lone file the last 5% are validation.
    A file beyond 4 MiB is read as several documents, cut after a line. Files of other kinds (JSON lines, tables,
    archives, what holds zero bytes) are refused where a path or a glob names them; in a folder they are passed over,
    which is logged.

    Raises:
      ValueError: no such source, split or feature (the message says which there are), files that are no text, or a
        prepared dataset that is damaged.
    """
    kind, _, rest = spec.partition(":")
    if kind == "tfds":
        return _open_tfds(rest, split, text_key, data_dir)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if spec == "builtin" or spec.startswith("builtin/"):
        return FeatureSource(builtin_examples(split, data_dir, config=spec.partition("/")[2] or "stdlib"), "text")
    pattern = os.path.expanduser(rest if kind == "text" else spec)
    files, base = _find_files(pattern) if pattern else ([], Path())
    if files:
        return FileSource(_file_pieces(files, base, split, spec))
    if kind == "text" or glob.has_magic(pattern) or os.path.exists(pattern):
        raise ValueError(f"data source {spec!r}: no text files match {pattern}")
    raise ValueError(f'data source {spec!r}: use "builtin", "tfds:name", "text:pattern" or a file, folder or glob')


def _find_files(pattern: str) -> tuple[list[Path], Path]:
    """The text files that a path or glob names, sorted, and the folder that their names are relative to."""
    path = Path(pattern)
    if path.is_file():
        files, base = [path], path.parent
    elif path.is_dir():
        found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
        plain = (file for file in found if file.is_file())  # opening a pipe or a device may never end
        shown = [file for file in plain if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        texts, others = _sorted_out(shown)
        if others and not texts:
            raise ValueError(refusal(others[0]))
        if others:
            _log.warning(
                "%s: %d files are passed over that are no plain text, such as %s", path, len(others), others[0]
            )
        return texts, path
    else:
        files = [Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
        parts = Path(pattern).parts
        fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        base = Path(*parts[:fixed])
    texts, others = _sorted_out(files)
    if others:
        raise ValueError(refusal(others[0]))
    return texts, base


def _sorted_out(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files of plain text, and the others, each in order."""
    try:
        kinds = {file: is_text(file) for file in sorted(files)}
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror or error}") from error
    return [file for file, text in kinds.items() if text], [file for file, text in kinds.items() if not text]


def _file_pieces(files: Sequence[Path], base: Path, split: str, spec: str) -> list[Piece]:
    if len(files) == 1:
        size = files[0].stat().st_size
        cut = _line_end(files[0], int(size * (1 - _TAIL)), size)
        ranges = {"train": (0, cut), "validation": (cut, size)}
        if split not in ranges:
            raise ValueError(f"data source {spec!r} is one file, which has no {split!r} split: use train or validation")
        pieces = _pieces(files[0], *ranges[split])
    else:
        splits = {file: split_of(file.relative_to(base).as_posix(), _HELD_OUT_FILES) for file in files}
        if "validation" not in splits.values():
            splits[files[-1]] = "validation"
        pieces = [piece for file in files if splits[file] == split for piece in _pieces(file, 0, file.stat().st_size)]
    if not pieces:
        raise ValueError(f"data source {spec!r}: none of its {len(files)} files has text for the split {split!r}")
    return pieces


def _pieces(file: Path, start: int, stop: int) -> list[Piece]:
    pieces = []
    while start < stop:
        end = stop if stop - start <= _PIECE_BYTES else _line_end(file, start + _PIECE_BYTES, stop)
        pieces.append(Piece(file, start, end))
        start = end
    return pieces


def _line_end(file: Path, offset: int, stop: int) -> int:
    """The first offset from `offset` on that begins a line, or failing that a character; `stop` if none does."""
    before = max(offset - 1, 0)
    with file.open("rb") as stream:
        stream.seek(before)
        following = stream.read(min(1 << 16, stop - before))
    newline = following.find(b"\n")
    if newline >= 0:
        return before + newline + 1
    return next((before + i for i, byte in enumerate(following) if i > 0 and byte & 0xC0 != 0x80), stop)


def _open_tfds(name: str, split: str, text_key: str, data_dir: str | Path | None) -> DocumentSource:
    def text_feature(features: Sequence[str]) -> Sequence[str]:
        if text_key not in features:
            raise ValueError(f"has no feature {text_key!r}: set text_key to one of {', '.join(features)}")
        return (text_key,)

    return FeatureSource(open_tfds(name, split, data_dir, text_feature), text_key)


def open_tfds(
    name: str, split: str, data_dir: str | Path | None, choose: Callable[[Sequence[str]], Sequence[str]]
) -> PreparedExamples:
    """The examples of one split of a TFDS dataset that was prepared as ArrayRecord.

    Args:
      name: the dataset's.
      split: one of its splits, or a slice of one.
      data_dir: where it is kept; TFDS's usual place by default.
      choose: from the names of its features those that are wanted; raises a ValueError, which goes on from the
        dataset's name, where they are not there.

    Raises:
      ValueError: no such dataset, split or feature, or files that are damaged.
    """
    data_dir = None if data_dir is None else user_path(data_dir)
    where = tfds.core.constants.DATA_DIR if data_dir is None else data_dir
    repair = "prepare it again"
    try:
        with one_line(Path(where) / name, repair, passed_on=tfds.core.DatasetNotFoundError):
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"no prepared TFDS dataset {name!r} under {where}: prepare it with file_format='array_record' (tfds build)"
        ) from error
    except ValueError:
        for info in sorted((Path(where) / name).glob("**/dataset_info.json")):
            check_metadata(info.parent, repair)  # says which file it is
        raise
    try:
        features = choose(sorted(builder.info.features))
    except ValueError as error:
        raise ValueError(f"TFDS dataset {name!r} {error}") from error
    if split.partition("[")[0] not in builder.info.splits:
        raise ValueError(f"TFDS dataset {name!r} has no split {split!r}: it has {', '.join(builder.info.splits)}")
    try:
        return PreparedExamples(builder, split, features, repair)
    except NotImplementedError as error:
        raise ValueError(
            f"TFDS dataset {name!r} is prepared without random access: prepare it with file_format='array_record'"
        ) from error
