"""The keeper of a machine: `python -m streamjax.snapshots.keeper SOCKET SECONDS`, the run's key in its environment.

It holds snapshots for the training processes of its machine, which reach it by the socket, and exchanges codes with the
keepers of the other machines. It ends when the run has ended, or when no training process has come for so many seconds.
It imports no JAX, so it starts at once and is small.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from multiprocessing.context import AuthenticationError
from pathlib import Path
from typing import Any

from streamjax.snapshots.generations import Generation, Name
from streamjax.snapshots.messages import Address, connect, receive, request, send
from streamjax.snapshots.stripes import Layout

KEY = "STREAMJAX_KEEPER_KEY"
_BACKLOG = 64
_EMPTY = 60.0  # seconds that a keeper waits for training processes that have given it nothing
_NICE = 5  # training comes first


class Keeper:
    """Snapshots of one machine, behind a socket.

    Args:
      socket: where training processes of this machine find it.
      key: what they and other keepers must know.
      seconds: without a training process, after which it ends.
    """

    def __init__(self, socket: str, key: bytes, seconds: float):
        self._key, self._seconds, self._socket = key, seconds, socket
        self._changed = threading.Condition()
        self._generations: dict[Name, Generation] = {}
        self._start_id, self._layout, self._host = "", Layout(1, 1, 0), 0  # of this start of the run
        self._others: dict[int, Address] = {}  # by the machine's number
        self._visitors = 0
        self._left = time.monotonic()
        self._stopped = self._ended = False
        self._ports: dict[str, int] = {}
        self._sending: queue.Queue[Callable[[], None]] = queue.Queue()
        self._listener = Listener(socket, "AF_UNIX", backlog=_BACKLOG)

    def run(self) -> None:
        """Serve until there is no more need."""
        self._in_thread(self._accept, self._listener, True)
        self._in_thread(self._send)
        with self._changed:
            while not self._stopped or self._visitors:
                patience = self._seconds if self._generations else min(self._seconds, _EMPTY)
                left = patience - (time.monotonic() - self._left)
                if not self._visitors and left <= 0:
                    break
                self._changed.wait(None if self._visitors else left)
        self._ended = True
        with contextlib.suppress(OSError):
            self._listener.close()  # and its file is gone
        Path(f"{self._socket}.log").unlink(missing_ok=True)

    def _in_thread(self, work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self, listener: Listener, local: bool) -> None:
        while not self._ended:
            with contextlib.suppress(OSError):
                self._in_thread(self._serve, listener.accept(), local)

    def _serve(self, connection: Connection, local: bool) -> None:
        """Answer one training process, or another keeper."""
        with connection, contextlib.suppress(EOFError, OSError, AuthenticationError):
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            self._visit(1 if local else 0)
            try:
                while True:
                    head, data = receive(connection)
                    try:
                        answer, parts = getattr(self, f"_on_{head['op']}")(head, data)
                    except Exception as error:  # whoever asked is told, and the keeper goes on
                        answer, parts = {"error": f"{type(error).__name__}: {error}"}, []
                    send(connection, answer, parts)
            finally:
                self._visit(-1 if local else 0)

    def _visit(self, count: int) -> None:
        with self._changed:
            self._visitors += count
            self._left = time.monotonic()
            self._changed.notify_all()

    def _on_listen(self, head: dict[str, Any], _: bytearray) -> tuple[dict[str, Any], list]:
        """Be there for other keepers, at an address of this machine; the port."""
        host = head["host"]
        with self._changed:
            if host not in self._ports:
                listener = Listener((host, 0), "AF_INET", backlog=_BACKLOG)
                self._ports[host] = listener.address[1]  # type: ignore[index]
                self._in_thread(self._accept, listener, False)
            return {"port": self._ports[host]}, []

    def _on_join(self, head: dict[str, Any], _: bytearray) -> tuple[dict[str, Any], list]:
        """Learn where the others are; only the snapshot that training goes on from stays."""
        with self._changed:
            self._start_id, self._layout, self._host = head["start_id"], Layout(*head["layout"]), head["host"]
            self._others = dict(head["others"])
            keep = None if head["keep"] is None else (str(head["keep"][0]), int(head["keep"][1]))
            self._generations = {name: found for name, found in self._generations.items() if name == keep}
        return {}, []

    def _on_status(self, *_: Any) -> tuple[dict[str, Any], list]:
        with self._changed:
            return {
                "pid": os.getpid(),
                "held": [[*name, found.describe()] for name, found in self._generations.items()],
            }, []

    def _on_put(self, head: dict[str, Any], data: bytearray) -> tuple[dict[str, Any], list]:
        """A training process's part of a snapshot."""
        name = self._name(head)
        with self._changed:
            found = self._generation(name)
            last = found.put(head["process"], data, head["local"])
        if last:
            self._sending.put(functools.partial(self._exchange, name, found))
        return {}, []

    def _on_piece(self, head: dict[str, Any], data: bytearray) -> tuple[dict[str, Any], list]:
        """A piece of another machine, to be coded here."""
        name = self._name(head)
        with self._changed:
            found = self._generation(name)
            found.add_piece(head["stripe"], head["block"], head["piece"], head["head"], memoryview(data))
        self._tell_if_complete(name, found)
        return {}, []

    def _on_complete(self, head: dict[str, Any], _: bytearray) -> tuple[dict[str, Any], list]:
        """Another machine holds all it is to hold."""
        name = self._name(head)
        with self._changed:
            self._mark(name, self._generation(name), head["host"])
        return {}, []

    def _on_wait(self, head: dict[str, Any], _: bytearray) -> tuple[dict[str, Any], list]:
        """Until a snapshot is everywhere, or for so many seconds; whether it is."""
        name, deadline = self._name(head), time.monotonic() + head["seconds"]
        with self._changed:
            while True:
                found = self._generations.get(name)
                done = found is not None and found.is_everywhere
                left = deadline - time.monotonic()
                if done or left <= 0 or self._stopped:
                    return {"complete": done}, []
                self._changed.wait(left)

    def _on_data(self, head: dict[str, Any], _: bytearray) -> tuple[dict[str, Any], list]:
        """A stretch of what this machine's processes gave."""
        with self._changed:
            found = self._generations[self._name(head)]
            if not found.whole:
                raise ValueError("this machine's data is not all here")
            return {}, list(found.data(head["start"], head["end"]))

    def _on_code(self, head: dict[str, Any], _: bytearray) -> tuple[dict[str, Any], list]:
        with self._changed:
            return {}, [self._generations[self._name(head)].codes[head["stripe"], head["block"]]]

    def _on_stop(self, *_: Any) -> tuple[dict[str, Any], list]:
        """The run has ended: end when the training processes have gone."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        return {}, []

    @staticmethod
    def _name(head: dict[str, Any]) -> Name:
        return head["start_id"], head["step"]

    def _generation(self, name: Name) -> Generation:
        if name[0] != self._start_id:
            raise ValueError("the run has been started again")
        return self._generations.setdefault(name, Generation(self._layout, self._host))

    def _mark(self, name: Name, found: Generation, host: int) -> None:
        found.complete.add(host)
        if found.is_everywhere and name in self._generations:
            self._generations = {
                other: held
                for other, held in self._generations.items()
                if other == name or (other[0] == name[0] and other[1] > name[1])
            }
        self._changed.notify_all()

    def _send(self) -> None:
        while True:
            work = self._sending.get()
            try:
                work()
            except (OSError, EOFError) as error:  # the other machine has gone; the snapshot stays incomplete
                print(f"keeper: {error}", file=sys.stderr, flush=True)

    def _exchange(self, name: Name, found: Generation) -> None:
        """Send this machine's pieces to those that code them."""
        common = {"op": "piece", "start_id": name[0], "step": name[1], "head": found.heads[found.machine]}
        for stripe, block, machine, piece, data in found.pieces():
            with connect(self._others[found.group[machine]], self._key) as connection:
                request(connection, {**common, "stripe": stripe, "block": block, "piece": piece}, data)
        self._tell_if_complete(name, found)

    def _tell_if_complete(self, name: Name, found: Generation) -> None:
        with self._changed:
            if not found.is_complete_here or found.host in found.complete:
                return
            self._mark(name, found, found.host)
            others = [address for host, address in self._others.items() if host != found.host]
        head = {"op": "complete", "start_id": name[0], "step": name[1], "host": found.host}
        for address in others:
            self._sending.put(functools.partial(self._tell, address, head))

    def _tell(self, address: Address, head: dict[str, Any]) -> None:
        with connect(address, self._key) as connection:
            request(connection, head)


def main(argv: list[str]) -> int:
    os.nice(_NICE)
    try:
        keeper = Keeper(argv[1], bytes.fromhex(os.environ.pop(KEY)), float(argv[2]))
    except OSError as error:
        print(f"keeper: {error}", file=sys.stderr)
        return 1
    keeper.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
