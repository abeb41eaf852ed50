"""Which files are plain text, and what to do with those that are not."""

from __future__ import annotations

from pathlib import Path

_JSON_LINES = (".jsonl", ".ndjson")
_RECORDS = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".avro", ".tfrecord", ".array_record", ".xlsx")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".lz4")
_SEEN = 1 << 16  # bytes from the start of a file in which zero bytes are looked for


def is_json_lines(file: Path) -> bool:
    """Whether a file holds one record a line, by its name."""
    return file.suffix.lower() in _JSON_LINES


def is_text(file: Path) -> bool:
    """Whether a file is plain text by its name and its first bytes."""
    if file.suffix.lower() in (*_JSON_LINES, *_RECORDS, *_PACKED):
        return False
    with file.open("rb") as stream:
        return b"\0" not in stream.read(_SEEN)


def refusal(file: Path) -> str:
    """One line: why a file that is no plain text is not trained on, and what would be."""
    kind, text = file.suffix.lower(), "give a file of plain text (.txt), or a prepared TFDS dataset as tfds:NAME"
    if kind in _JSON_LINES:
        return (
            f"{file} is JSON lines, of which every bracket would be trained on as text: set data.format to "
            '"conversations", "preferences" or "prompts", by what its records hold, or ' + text
        )
    if kind in _RECORDS:
        return f"{file} holds records ({kind}) and no plain text: write their text into files, and {text}"
    if kind in _PACKED:
        return f"{file} is compressed ({kind}): unpack it, and {text}"
    return f"{file} is not UTF-8 text: it holds zero bytes; {text}"
