"""Snapshots as a training process takes them and gets them back; all processes of a run call these together."""

from __future__ import annotations

import logging
import secrets
import threading
from typing import Any, TypeVar

import jax

from streamjax.parallel.multiprocess import addresses, gather_json
from streamjax.snapshots.choosing import Reader, held_by, newest
from streamjax.snapshots.client import find_or_start, host_name, socket_path
from streamjax.snapshots.generations import Name
from streamjax.snapshots.messages import connect, request
from streamjax.snapshots.shards import from_bytes, sealed, to_parts
from streamjax.snapshots.stripes import Layout, require_zfec

Tree = TypeVar("Tree")
_log = logging.getLogger(__name__)
_PATIENCE = 600  # seconds, beside those of an interval, for a snapshot to be everywhere


class Snapshots:
    """What the keepers of a run's machines hold, and how more is given to them.

    A snapshot is taken in two parts: state is copied from devices while training waits, and sent to the keeper
    while training goes on. Keepers code it by themselves. The snapshot before stays until the new one is everywhere.

    Args:
      key: of the run, the same in all processes.
      most: machines of a group, in which codes are exchanged.
      lost: machines that a group may lose at once.
      seconds: without training processes, after which keepers end.

    Raises:
      ValueError: no keeper, no zfec, or more machines may be lost than there are.
    """

    def __init__(self, key: bytes, *, most: int = 8, lost: int = 1, seconds: float = 3600.0):
        self._key, self._failure = key, ""
        self._thread: threading.Thread | None = None
        self._keeper = find_or_start(key, seconds)
        own = addresses()[jax.process_index()]
        address: Any = str(socket_path(key))
        if own is not None:
            address = [own, request(self._keeper, {"op": "listen", "host": own})[0]["port"]]
        held = request(self._keeper, {"op": "status"})[0]["held"]
        mine = {"host": host_name(), "address": address, "held": held, "start_id": secrets.token_hex(8)}
        everyone = gather_json(mine)
        self._start_id: str = everyone[0]["start_id"]
        hosts = {entry["host"]: entry for entry in reversed(everyone)}  # the first process of each speaks for it
        names = sorted(hosts, key=lambda name: everyone.index(hosts[name]))
        self._layout = Layout(len(names), most, lost)
        if len(names) > 1 and lost:
            require_zfec()
        self._host = names.index(host_name())
        self._places = [[number, hosts[name]["address"]] for number, name in enumerate(names)]
        self._local = [number for number, entry in enumerate(everyone) if entry["host"] == host_name()]
        self._held = held_by([(hosts[name]["address"], hosts[name]["held"]) for name in names])
        self._newest = newest(self._held)
        self._taken: int | None = None
        self.lost: list[int] = []  # machines whose part of the snapshot that was restored had to be computed

    @property
    def newest_step(self) -> int | None:
        """The latest step whose snapshot can be restored, of an earlier start of the run."""
        return None if self._newest is None else self._newest[1]

    def restore(self, template: Tree) -> tuple[Tree, dict[str, Any]] | None:
        """The newest snapshot, in the structure and on the devices of `template`, and what was saved beside it.

        None, with a line in the log, where any of the processes cannot have it.
        """
        assert self._newest is not None
        held, found, reason = self._held[self._newest], None, ""
        reader = Reader(self._newest, held, self._key)
        try:
            found = from_bytes(reader.read(jax.process_index()), template)
        except (OSError, LookupError, ValueError) as error:
            reason = str(error)
        finally:
            reader.close()
        if failed := [reason for reason in gather_json(reason) if reason]:
            if jax.process_index() == 0:
                _log.warning("the snapshot of step %d in memory is of no use: %s", self._newest[1], failed[0])
            return None
        self.lost = held.lost
        return found

    def begin(self, keep: bool) -> None:
        """Tell keepers where the others are; of earlier snapshots they `keep` the one that was restored, or none."""
        kept: Name | None = self._newest if keep else None
        head = {"op": "join", "start_id": self._start_id, "layout": [*vars(self._layout).values()], "host": self._host}
        request(self._keeper, {**head, "others": self._places, "keep": kept})
        gather_json(None)  # no keeper hears of a snapshot before it knows the others

    def take(self, step: int, tree: Any, about: dict[str, Any]) -> None:
        """Take a snapshot of a pytree and a dictionary that JSON can hold; nothing if an earlier one has failed.

        The dictionary is this process's own. Waits until the snapshot before is everywhere.
        """
        self._finish()
        if self._failure:
            return
        parts = to_parts(tree, about)
        head = {"op": "put", "start_id": self._start_id, "step": step, "process": jax.process_index()}
        self._thread = threading.Thread(target=self._put, args=({**head, "local": self._local}, parts), daemon=True)
        self._thread.start()
        self._taken = step

    def wait(self) -> bool:
        """Until the last snapshot is everywhere; whether it is."""
        self._finish()
        return not self._failure

    def close(self, ended: bool) -> None:
        """Leave the keeper; where the run has `ended` and no process will ask for it, it ends too."""
        if self._thread is not None:
            self._thread.join(_PATIENCE)
        try:
            if ended:
                request(self._keeper, {"op": "stop"})
        except OSError:
            pass  # it has gone already
        self._keeper.close()

    def _put(self, head: dict[str, Any], parts: list[Any]) -> None:
        try:
            request(self._keeper, head, sealed(parts))
        except OSError as error:
            self._fail(str(error))

    def _finish(self) -> None:
        """Wait for the snapshot that is under way."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._failure:
            return
        head = {"op": "wait", "start_id": self._start_id, "step": self._taken, "seconds": _PATIENCE}
        try:
            if not request(self._keeper, head)[0]["complete"]:
                self._fail(f"other machines did not take their part in {_PATIENCE} seconds")
        except OSError as error:
            self._fail(str(error))

    def _fail(self, reason: str) -> None:
        self._failure = reason
        _log.warning("no more snapshots in memory until the run is started again: %s", reason)


def keepers_memory(key: bytes) -> list[Any]:
    """What this machine's keeper holds, for tests and benchmarks."""
    with connect(str(socket_path(key)), key) as connection:
        return request(connection, {"op": "status"})[0]["held"]
