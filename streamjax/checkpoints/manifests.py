"""Checksums of a folder's files: written last when the folder is saved, checked before its arrays are used.

`checksums.json` lists the files that a save wrote, with their sizes and SHA-256 as `sha256sum` prints it. Files that it
does not list are nobody's business, and a folder without one is not checked: others wrote it, or an older version.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from streamjax.checkpoints.json_files import read_json, require_file
from streamjax.checkpoints.text_files import replace_text

MANIFEST = "checksums.json"
VERIFY = "STREAMJAX_VERIFY"  # environment variable; "0": files are not compared with their checksums
_FORMAT = 1
_BLOCK = 1 << 22
Entry = tuple[int, str]  # of a file: bytes, and SHA-256


class DamagedFile(ValueError):
    """A file that is not as it was saved; the message is one line that names it."""


def write_manifest(folder: Path, files: Iterable[Path], others: Mapping[str, Entry] | None = None) -> None:
    """List files of a folder, as they are now, in its manifest, and `others` with what is known of them."""
    names = sorted({file.relative_to(folder).as_posix() for file in files} - {MANIFEST})
    listed = dict(others or {}) | dict(zip(names, _in_threads([folder / name for name in names]), strict=True))
    entries = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(listed.items())}
    text = json.dumps({"format": _FORMAT, "files": entries}, indent=1) + "\n"
    replace_text(folder / MANIFEST, text)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Size and SHA-256 of every file that the manifest of a folder lists; nothing where there is no manifest.

    Raises:
      DamagedFile: the manifest is damaged.
    """
    file = folder / MANIFEST
    if not os.path.lexists(file):
        return {}
    try:
        values = read_json(file)
    except ValueError as error:
        raise DamagedFile(str(error)) from error
    files = values.get("files")
    if values.get("format") != _FORMAT or not isinstance(files, dict):
        raise DamagedFile(f"{file}: no list of files in format {_FORMAT}")
    found = {}
    for name, entry in files.items():
        place = PurePosixPath(name)
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if place.is_absolute() or ".." in place.parts or type(size) is not int or not isinstance(digest, str):
            raise DamagedFile(f"{file}: its entry of {name!r} is damaged")
        found[name] = size, digest
    return found


def check_manifest(folder: Path, under: str = "") -> None:
    """Compare the files that a folder's manifest lists with it: all, or those whose names begin with `under`.

    Raises:
      DamagedFile: one is missing, truncated or has changed, or the manifest is damaged.
    """
    if os.environ.get(VERIFY) == "0":
        return
    listed = {name: entry for name, entry in read_manifest(folder).items() if name.startswith(under)}
    advice = f"restore it from a copy; if the change is meant, delete {MANIFEST} beside it"
    for name, (size, _) in listed.items():
        try:
            require_file(folder / name)
        except ValueError as error:
            raise DamagedFile(f"{error}, although {MANIFEST} lists it") from error
        found = (folder / name).stat().st_size
        if found != size:
            raise DamagedFile(f"{folder / name} has {found} bytes, and was saved with {size}: {advice}")
    hashes = _in_threads([folder / name for name in listed])
    for (name, (_, digest)), (_, found_digest) in zip(listed.items(), hashes, strict=True):
        if digest != found_digest:
            raise DamagedFile(f"{folder / name} has changed since it was saved (its SHA-256 differs): {advice}")


def _size_and_hash(file: Path) -> Entry:
    with file.open("rb", buffering=0) as stream:
        digest = hashlib.sha256()
        size, block = 0, bytearray(_BLOCK)
        while count := stream.readinto(block):
            digest.update(memoryview(block)[:count])
            size += count
    return size, digest.hexdigest()


def _in_threads(files: list[Path]) -> list[Entry]:
    """Of each file; hashing lets go of Python's lock."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_size_and_hash, files))
