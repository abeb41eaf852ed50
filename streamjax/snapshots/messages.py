"""What keepers and training processes say to each other: a JSON head, then bytes in parts of a bounded size."""

from __future__ import annotations

import json
from collections.abc import Iterable
from multiprocessing.connection import Client, Connection
from typing import Any

PART = 16 * 2**20  # bytes of a message, which is in memory twice while it is received
Address = Any  # the path of a socket on this machine, or [host, port]


def send(connection: Connection, head: dict[str, Any], data: Iterable[Any] = ()) -> None:
    """A head, and what `data` gives one after the other; the head gets its size in bytes."""
    parts = [memoryview(part).cast("B") for part in data if len(part)]
    connection.send_bytes(json.dumps({**head, "bytes": sum(map(len, parts))}).encode())
    for part in parts:
        for start in range(0, len(part), PART):
            connection.send_bytes(part[start : start + PART])


def receive(connection: Connection) -> tuple[dict[str, Any], bytearray]:
    """What `send` has sent. Raises EOFError or OSError where the other side has gone."""
    head = json.loads(connection.recv_bytes())
    data, place = bytearray(head["bytes"]), 0
    while place < len(data):
        part = connection.recv_bytes()
        data[place : place + len(part)] = part
        place += len(part)
    return head, data


def request(connection: Connection, head: dict[str, Any], data: Iterable[Any] = ()) -> tuple[dict[str, Any], bytearray]:
    """Ask, and wait for the answer.

    Raises:
      OSError: the other side has gone, or does not do what it is asked to.
    """
    send(connection, head, data)
    try:
        answer, found = receive(connection)
    except EOFError as error:
        raise ConnectionResetError("the keeper has gone") from error
    if "error" in answer:
        raise OSError(answer["error"])
    return answer, found


def connect(address: Address, key: bytes) -> Connection:
    """A connection to a keeper.

    Raises:
      OSError: nobody listens there, or has another key.
    """
    from multiprocessing import AuthenticationError

    place = address if isinstance(address, str) else (str(address[0]), int(address[1]))
    try:
        return Client(place, authkey=key)  # type: ignore[return-value]
    except (EOFError, AuthenticationError) as error:
        raise ConnectionRefusedError(f"{place}: the keeper there is of another run") from error
