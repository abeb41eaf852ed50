"""Sockets: who may hold one, for how long, and how the server ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

_REQUEST_SECONDS = 30.0  # from a connection to the end of its first request's headers
_READ_SECONDS = 60.0  # that a client may take no byte of what waits for it
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))  # a machine that has vanished


class Connection(H11Protocol):
    """A connection that ends where its client sends no request, or does not read."""

    request_seconds, read_seconds = _REQUEST_SECONDS, _READ_SECONDS

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._stalled: asyncio.TimerHandle | None = None
        self._silent = self.loop.call_later(self.request_seconds, self._end_if_silent)
        if (own := transport.get_extra_info("socket")) is not None and own.family != getattr(socket, "AF_UNIX", None):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE:
                if hasattr(socket, name):
                    own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._silent.cancel()  # the transport is another protocol's from here on, which sends pings
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._silent.cancel()
        self._stop_watching()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_watching()
        self._stalled = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _end_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.abort()


class Server(uvicorn.Server):
    """A server that SIGTERM and SIGINT end in order: no new clients, answers end, all is saved; twice: at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def end(number: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

        try:
            before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: whoever started it ends it
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.should_exit:
            return
        for each in sockets or ():
            address, port = each.getsockname()[:2]
            host = f"[{address}]" if ":" in address else address
            print(f"serving at http://{host}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      ValueError: there is no such address, or somebody listens there already.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        own = socket.socket(*found[:3])
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(found[4])
        own.listen(2048)
    except OSError as error:
        raise ValueError(f"--host={host} --port={port}: {error.strerror or error}") from error
    return own


def make_server(app: ASGIApp, *, shutdown_seconds: int = 30) -> Server:
    """A server for an application; `Server.run(sockets=[...])` serves until a signal comes.

    Args:
      app: what is served.
      shutdown_seconds: that answers under way have at the end, before they are cancelled.
    """
    return Server(
        uvicorn.Config(
            app,
            http=Connection,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=shutdown_seconds,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=64 << 10,
            ws_max_size=1 << 20,
        )
    )
