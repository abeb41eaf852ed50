"""Other servers, each started from an environment of its own, so that the same clients can measure them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PEERS = {
    "vllm": ["vllm", "serve", "{model}", "--max-model-len=4096", "--enable-prefix-caching", "--dtype=float32"],
    "transformers": ["transformers", "serve", "{model}", "--continuous-batching", "--dtype=float32", "--device=cpu"],
}
PATIENCE = 900  # seconds in which a server has to begin


@contextlib.contextmanager
def peer(name: str, environment: Path, model: str) -> Iterator[str]:
    """A server of a model, in a process of its own; its address.

    Args:
      name: of `PEERS`. environment: a virtual environment that has it. model: a folder.

    Raises:
      RuntimeError: it ends, or does not answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *rest = (part.format(model=Path(model).absolute()) for part in PEERS[name])
    command = [str(environment.absolute() / "bin" / program), *rest, "--host=127.0.0.1", f"--port={port}"]
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            end = time.monotonic() + PATIENCE
            while not _answers(f"{url}/v1/models"):
                if process.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    lines = said.read().strip().splitlines()
                    raise RuntimeError(f"{name} does not serve: {lines[-1] if lines else 'it said nothing'}")
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as found:
            return bool(found.status == 200)
    except (urllib.error.URLError, OSError):
        return False
