"""Records of JSON lines, or of a prepared TFDS dataset, one after another, each with the place where it was found."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from streamjax.checkpoints.json_files import parse_json
from streamjax.data.file_kinds import is_json_lines
from streamjax.data.prepared_corpora import PreparedExamples
from streamjax.data.stdlib_corpus import SPLITS, split_of

_HELD_OUT = {"test": 0.05, "validation": 0.05}
_NAMED_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "eval": "validation", "test": "test",
}  # fmt: skip


class Record(NamedTuple):
    """One record: where it stands, for messages, and its values or what is wrong with it."""

    place: str
    values: Mapping[str, Any]
    error: str | None = None


def read_lines(spec: str, split: str) -> Iterator[Record]:
    """The records of one split of JSON lines; blank lines are no records.

    If files are named after splits ("train.jsonl", "test-0.jsonl"; "valid", "val", "dev" and "eval" are validation
    too), a file is of the split that its name says, and of "train" where it says none. Otherwise each record falls into
    a split by a hash of its line: 90% train, 5% validation, 5% test, of several records at least one for validation.

    Args:
      spec: a .jsonl or .ndjson file, a folder of them, or a glob.
      split: "train", "validation" or "test".

    Yields:
      Records; those with an error are no JSON object, or no UTF-8.

    Raises:
      ValueError: no such files, one that cannot be read, or an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    files = find_json_lines(spec)
    named = {file: _split_in_name(file) for file in files}
    if any(named.values()):
        splits = {file: named[file] or "train" for file in files}
        yield from (
            _record(file, number, line) for file in files if splits[file] == split for number, line in _lines(file)
        )
        return
    held_out = last = None
    for file in files:
        for number, line in _lines(file):
            last = (file, number)
            if _split_of_line(line) == "validation":
                held_out = last
    for file in files:
        for number, line in _lines(file):
            belongs = _split_of_line(line)
            if held_out is None and (file, number) == last and last != (files[0], 1):
                belongs = "validation"
            if belongs == split:
                yield _record(file, number, line)


def find_json_lines(spec: str) -> list[Path]:
    """The files of JSON lines that a path or a glob names, sorted; in a folder others are passed over.

    Raises:
      ValueError: there is none, or a path or glob names a file of another kind.
    """
    pattern = os.path.expanduser(spec)
    path = Path(pattern)
    if path.is_dir():
        found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
        shown = (file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
        files = sorted(file for file in shown if is_json_lines(file) and file.is_file())
    else:
        files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
        files = [path] if path.is_file() else files
        other = next((file for file in files if not is_json_lines(file)), None)
        if other is not None:
            raise ValueError(f"{other} is no file of JSON lines (.jsonl): write one record a line into such a file")
    if not files:
        raise ValueError(f"data source {spec!r}: no JSON lines there; name a .jsonl file, a folder or glob of them")
    return files


def plain_values(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example of TFDS as JSON would have it: text for bytes, and a list of messages for a dictionary of lists."""
    return {name: _plain(value) for name, value in example.items()}


def tfds_records(examples: PreparedExamples, name: str) -> Iterator[Record]:
    """The records of a split of a prepared dataset."""
    for index in range(len(examples)):
        yield Record(f"tfds:{name}, example {index}", plain_values(examples[index]))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, np.ndarray):
        return [_plain(entry) for entry in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        columns = {key: _plain(entry) for key, entry in value.items()}
        if columns and all(isinstance(column, list) for column in columns.values()):
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return columns
    return [_plain(entry) for entry in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                line = line.strip()
                if line:
                    yield number, line
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error


def _record(file: Path, number: int, line: bytes) -> Record:
    place = f"{file}, line {number}"
    try:
        values = parse_json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except ValueError as error:
        return Record(place, {}, f"it is no JSON ({' '.join(str(error).split())[:120]})")
    if not isinstance(values, dict):
        return Record(place, {}, f"it is {type(values).__name__} in JSON, and an object is needed")
    return Record(place, values)


def _split_in_name(file: Path) -> str | None:
    word = file.stem.lower().replace("_", "-").replace(".", "-").partition("-")[0]
    return _NAMED_SPLITS.get(word)


def _split_of_line(line: bytes) -> str:
    return split_of(hashlib.sha256(line).hexdigest(), _HELD_OUT)
