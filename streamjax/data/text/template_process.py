"""Chat templates rendered in a process of their own, whose time, memory and output are bounded.

Nothing inside an interpreter holds a template to such bounds. Loops could be counted, but one expression is enough:
`'a' * 10**10`, `2**10**10`, `'%10000000000d' % 1`, a product of strings by a filter, a sum of lists, a macro that calls
itself twice; each is a single call into C, some run while the template is compiled, and a list of what is forbidden is
never complete. The operating system's limits hold whatever the template does: seconds of CPU and bytes of address space
for each request, set by the process itself before it looks at it, and seconds on the clock, kept by whoever asks, who
then kills the process. One process serves all requests, one after another; it starts with the first, in a tenth of a
second, and a request then takes a fraction of a millisecond beyond the rendering itself.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from streamjax.data.text import template_sandbox

_START_SECONDS = 60.0
SECONDS = 5.0  # on the clock, for a request; the CPU's are `template_sandbox.CPU_SECONDS`
_SECONDS_A_BYTE = 1e-7
_BLOCK = 1 << 20


def render_apart(template: str, names: Mapping[str, Any]) -> str:
    """`template_sandbox.render` within bounds of time, memory and output.

    Raises:
      ValueError: as there, or the template exceeds a bound.
    """
    request = json.dumps({"template": template, "names": names}).encode()
    with _Renderer.lock:
        renderer = _Renderer.running()
        try:
            answer = json.loads(renderer.ask(request))
        except BaseException:  # Ctrl-C too: its answer would be taken for the next one's
            _Renderer.stop()
            raise
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["text"]


class _Renderer:
    """The process, and the pipes to it."""

    lock = threading.Lock()
    _current: _Renderer | None = None

    def __init__(self) -> None:
        places = dict.fromkeys(str(Path(package.__path__[0]).parent) for package in (jinja2, markupsafe))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", template_sandbox.__file__, *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C does not reach it
        )
        self._read(1, time.monotonic() + _START_SECONDS)

    @classmethod
    def running(cls) -> _Renderer:
        """The process that is there, or a new one."""
        if cls._current is None or cls._current._process.poll() is not None:
            cls.stop()
            cls._current = cls()
        return cls._current

    @classmethod
    def stop(cls) -> None:
        """End the process, if there is one."""
        renderer, cls._current = cls._current, None
        if renderer is not None:
            renderer._process.kill()
            renderer._process.communicate()

    @classmethod
    def forget(cls) -> None:
        """In a forked child: the process belongs to the parent."""
        cls.lock, cls._current = threading.Lock(), None

    def ask(self, request: bytes) -> bytes:
        """The answer to a request."""
        deadline = time.monotonic() + SECONDS + _SECONDS_A_BYTE * len(request)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(len(request).to_bytes(8) + request)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._read(int.from_bytes(self._read(8, deadline)), deadline)

    def _read(self, count: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, parts = self._process.stdout.fileno(), []
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while count:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise ValueError(f"chat template refused: it takes more than {SECONDS:g} seconds")
                part = os.read(descriptor, min(count, _BLOCK))
                if not part:
                    raise self._ended()
                parts.append(part)
                count -= len(part)
        return b"".join(parts)

    def _ended(self) -> ValueError:
        """Why the process is gone."""
        if self._process.wait() == -signal.SIGXCPU:
            return ValueError(f"chat template refused: it takes more than {template_sandbox.CPU_SECONDS} seconds")
        return ValueError("chat template refused: the process that rendered it was ended, for want of memory perhaps")


os.register_at_fork(after_in_child=_Renderer.forget)
atexit.register(_Renderer.stop)
