"""Training processes and their machine's keeper: found, or started if there is none."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from streamjax.snapshots.keeper import KEY
from streamjax.snapshots.messages import connect

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

HOST = "STREAMJAX_HOST"  # names the machine; processes with the same name share a keeper
_SECONDS = 60  # in which a keeper starts
_PAUSE = 0.05
_LONGEST = 100  # bytes of a socket's path; systems allow 103 or 107


def host_name() -> str:
    """The name of this machine, or what STREAMJAX_HOST has in its place."""
    return os.environ.get(HOST) or socket.gethostname()


def socket_path(key: bytes) -> Path:
    """Where the keeper of a run listens on this machine: below TMPDIR, or /tmp where that is too long for a socket.

    Raises:
      ValueError: the folder for it belongs to somebody else.
    """
    name = hashlib.sha256(key + host_name().encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"streamjax-{os.getuid()}"
    if len(os.fsencode(folder / name)) > _LONGEST:
        folder = Path("/tmp") / folder.name
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise ValueError(f"{folder} can be read by others: remove it, or set TMPDIR to another folder")
    return folder / name


def find_or_start(key: bytes, seconds: float) -> Connection:
    """A connection to this machine's keeper, which is started if there is none and outlives this process.

    Args:
      key: of the run.
      seconds: without training processes, after which a new keeper ends.

    Raises:
      ValueError: it cannot be started.
    """
    if fcntl is None:
        raise ValueError(
            "snapshots in memory need Unix sockets, which this system has not: set snapshots.interval to 0"
        )
    path = socket_path(key)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # one process looks and starts it, the others find it
        try:
            return connect(str(path), key)
        except OSError:
            path.unlink(missing_ok=True)  # of a keeper that was killed
        process, deadline = _start_keeper(path, key, seconds), time.monotonic() + _SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                return connect(str(path), key)
            except OSError:
                time.sleep(_PAUSE)
        raise ValueError(f"the keeper of snapshots did not start; {path}.log says why")
    finally:
        os.close(folder)


def _start_keeper(path: Path, key: bytes, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-m", "streamjax.snapshots.keeper", str(path), str(seconds)]
    environment = {**os.environ, KEY: key.hex()}
    with open(f"{path}.log", "ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
