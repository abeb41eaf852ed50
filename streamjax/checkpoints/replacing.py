"""Folders that are replaced whole: written beside the old one, flushed to the disk, and put in its place in one step.

Whoever reads the folder finds the old one or the new one, also after the process was killed or the power failed at any
point. Processes that save to the same path wait for each other. Linux exchanges two folders in one step (`renameat2`).
Elsewhere it takes two renames, and a reader who comes between them takes the new one from where it lies (`whole`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from streamjax.checkpoints.manifests import MANIFEST, DamagedFile, Entry, read_manifest, write_manifest
from streamjax.checkpoints.save_lock import locked

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class SaveError(OSError, ValueError):
    """Something could not be saved; what was there before is as it was. The message is one line."""


def whole(path: str | Path) -> Path:
    """The folder to read: `path`, or what a process left that died after it had moved `path` away."""
    path = Path(path)
    if not path.exists():
        fresh, old = _beside(path)
        if (fresh / MANIFEST).is_file():
            return fresh
        if old.exists():
            return old
    return path


@contextlib.contextmanager
def replaced_folder(path: str | Path, owned: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `path` when the block ends without an error.

    It gets a manifest of what was written. What a user has put into the old folder comes along.

    Args:
      path: the folder; made where it is missing.
      owned: whether an entry of the old folder, by name, belongs to what is replaced; all others are the user's.

    Raises:
      SaveError: the disk is full, or does not let itself be written to.
    """
    path = Path(path).resolve()
    try:
        with alone(path):
            fresh = begin(path)
            try:
                fresh.mkdir()
                yield fresh
                commit(path, fresh, owned)
            except BaseException:
                discard(fresh)
                raise
    except SaveError:
        raise
    except OSError as error:
        raise not_saved(path, error) from error


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """While another process saves to `path`, wait; the last one to come is the one whose save stays.

    Raises:
      OSError: there is no place for the lock, or the other one does not end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(_beside(path)[0].with_suffix(".lock")):
        yield


def not_saved(path: Path, error: Exception) -> SaveError:
    """The error that says in one line why `path` was not saved."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    for known in ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system"):
        reason = known if known in reason else reason
    return SaveError(f"{path} was not saved: {reason[:300]}; what was there before is as it was")


def begin(path: Path) -> Path:
    """Clear away what killed saves have left, and return where the new folder is to be made."""
    if path.exists() and not path.is_dir():
        raise SaveError(f"{path} was not saved: there is a file of that name; choose another path")
    fresh, old = _beside(path)
    if not path.exists() and (found := whole(path)) != path:
        os.rename(found, path)
    discard(fresh)
    shutil.rmtree(old, ignore_errors=True)
    return fresh


def commit(path: Path, fresh: Path, owned: Callable[[str], bool]) -> None:
    """Complete the new folder and put it where the old one is."""
    ours = (MANIFEST, fresh.name, fresh.with_suffix(".lock").name)
    entries = [entry for entry in path.iterdir() if entry.name not in ours] if path.exists() else []
    kept = [entry for entry in entries if not owned(entry.name) and not os.path.lexists(fresh / entry.name)]
    seal(fresh, _known(path, {entry.name for entry in kept}))
    if fresh.parent == path:
        _move_into(fresh, path, owned)
    else:
        for entry in kept:
            _carry(entry, fresh / entry.name)
        _put(fresh, path)
    _flush(path.parent)


def seal(folder: Path, others: Mapping[str, Entry] | None = None, unlisted: str = "") -> None:
    """Give a folder that was written its manifest, and see that all of it is on the disk.

    Args:
      folder: all its files go into the manifest, but for one named `unlisted`.
      others: what the manifest says besides.
    """
    written = [file for file in folder.rglob("*") if file.is_file() and file.name != unlisted]
    for file in written:
        _flush(file)
    write_manifest(folder, written, others)
    _flush(folder / MANIFEST)
    for place in sorted({folder, *(file.parent for file in written)}, reverse=True):
        _flush(place)


def place_beside(path: Path) -> Path:
    """Where `begin` has the new folder made."""
    return _beside(path)[0]


def discard(fresh: Path) -> None:
    """Take away a new folder that is not complete, with what Orbax has begun of it.

    Threads of Orbax may still write for a moment after a save has failed, so it looks again.
    """
    for _ in range(50):
        names = [path.name for path in fresh.parent.iterdir()] if fresh.parent.is_dir() else []
        left = [name for name in names if name == fresh.name or name.startswith(f"{fresh.name}.orbax-checkpoint-tmp")]
        if not left:
            return
        for name in left:
            shutil.rmtree(fresh.with_name(name), ignore_errors=True)
        time.sleep(0.02)


def _beside(path: Path) -> tuple[Path, Path]:
    """Where the new folder is written, and where the old one goes where they cannot be exchanged."""
    if path.is_dir() and (path.is_mount() or not os.access(path.parent, os.W_OK) or path in _working_folders()):
        # The folder itself must stay, only what is in it is replaced.
        return path / ".streamjax.new", path / ".streamjax.old"
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def _working_folders() -> tuple[Path, ...]:
    """The process's working folder and those above it."""
    with contextlib.suppress(FileNotFoundError):
        return Path.cwd(), *Path.cwd().parents
    return ()


def _known(path: Path, kept: set[str]) -> dict[str, Entry]:
    """What the old manifest says of files that stay; a damaged one says nothing."""
    try:
        listed = read_manifest(path)
    except DamagedFile:
        return {}
    return {name: entry for name, entry in listed.items() if PurePosixPath(name).parts[0] in kept}


def _put(fresh: Path, path: Path) -> None:
    """The new folder in place of the old one."""
    old = _beside(path)[1]
    if not path.exists():
        os.rename(fresh, path)
    elif _exchange(fresh, path):
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        os.rename(path, old)
        os.rename(fresh, path)
        shutil.rmtree(old, ignore_errors=True)


def _move_into(fresh: Path, path: Path, owned: Callable[[str], bool]) -> None:
    """The entries of the new folder into the old one, the manifest first: until the last one is there, files differ
    from it, and a reader refuses the folder."""
    os.replace(fresh / MANIFEST, path / MANIFEST)
    _flush(path)
    for entry in path.iterdir():
        if owned(entry.name) and not (fresh / entry.name).is_file():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for entry in fresh.iterdir():
        os.replace(entry, path / entry.name)
    fresh.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    first, second = (ctypes.c_char_p(os.fsencode(path)) for path in (one, other))
    return renameat2(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_RENAME_EXCHANGE)) == 0


def _carry(entry: Path, to: Path) -> None:
    """A user's file or folder under another name too: by links, which cost nothing, or as a copy."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, to, symlinks=True, copy_function=_link)
    else:
        _link(entry, to)


def _link(source: str | Path, to: str | Path) -> None:
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, to, follow_symlinks=False)


def _flush(path: Path) -> None:
    """Make sure that a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
