"""Processes of a run watch each other, so that those which are left can say who is gone.

JAX notices a death too, but an error of a collective names no process, and the death of the coordinator ends the
others with a report of many lines. Here each process holds a connection to process 0, whose kernel closes it when a
process dies, and which keep-alive probes close when a machine is gone. Process 0 tells the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener

import jax

from streamjax.parallel.multiprocess import HEARTBEAT_SECONDS, addresses, gather_json

_PROBES = 3  # without an answer, after which a machine counts as gone
_BACKLOG = 256


class Watch:
    """A watch over the other processes; all of them begin one together.

    Args:
      on_lost: called with a line that says which process is gone, once, from another thread.
    """

    def __init__(self, on_lost: Callable[[str], None]):
        self._on_lost, self._lock = on_lost, threading.Lock()
        self._over = threading.Event()  # one is gone, or this process leaves
        self._told = threading.Event()
        self._index, self._count = jax.process_index(), jax.process_count()
        self._others: dict[int, Connection] = {}
        place, own = None, addresses()[self._index] or "127.0.0.1"
        if self._index == 0:
            key, listener = secrets.token_bytes(16), Listener((own, 0), "AF_INET", backlog=_BACKLOG)
            place = [*listener.address, key.hex()]
        host, port, key_hex = gather_json(place)[0]
        if self._index == 0:
            listener._authkey = bytes.fromhex(key_hex)  # type: ignore[attr-defined]
            for _ in range(self._count - 1):
                connection = listener.accept()
                self._others[json.loads(connection.recv_bytes())] = connection
            listener.close()
        else:
            self._others[0] = Client((host, port), authkey=bytes.fromhex(key_hex))
            self._others[0].send_bytes(json.dumps(self._index).encode())
        _delay_aborts()
        for index, connection in self._others.items():
            _probe(connection)
            threading.Thread(target=self._listen, args=(index, connection), daemon=True).start()

    def leave(self, failed: bool = False) -> None:
        """End the watch: this process comes to its end, which the others are not to take for a death.

        failed: with an error that it tells itself; the others end then.
        """
        with self._lock:
            self._over.set()
        self._send({"failed" if failed else "left": self._index})

    def wait(self, seconds: float) -> None:
        """Give `on_lost` the time to be called, which knows more than an error of a collective does."""
        if self._over.wait(seconds):
            self._told.wait(seconds)

    def _listen(self, index: int, connection: Connection) -> None:
        """Hear what another process says, until it is gone."""
        try:
            said = json.loads(connection.recv_bytes())
        except (EOFError, OSError, ValueError):
            said = {"died": index}
        for how, who in said.items():
            if how != "left":
                self._lost(how, who)

    def _lost(self, how: str, index: int) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
        self._send({how: index})
        reason = "has failed, and says why itself" if how == "failed" else "has died or cannot be reached"
        self._on_lost(f"process {index} of {self._count} {reason}")
        self._told.set()

    def _send(self, said: dict[str, int]) -> None:
        for connection in self._others.values():
            with contextlib.suppress(OSError):
                connection.send_bytes(json.dumps(said).encode())


def _delay_aborts() -> None:
    """Give this watch a moment where JAX aborts the process, as it does at once when the coordinator has died.

    JAX has a callback for that, which fails in its bindings. So C's `sleep` handles the signal: it gets the signal's
    number as its argument, sleeps 6 seconds in the thread that aborts, and the abort goes on if the process is still
    there.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _probe(connection: Connection) -> None:
    """Have the kernel ask whether the other machine is there, and close the connection if it is not."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        seconds = HEARTBEAT_SECONDS // (_PROBES + 1)
        for name, value in (("TCP_KEEPIDLE", seconds), ("TCP_KEEPINTVL", seconds), ("TCP_KEEPCNT", _PROBES)):
            if hasattr(socket, name):
                same.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
