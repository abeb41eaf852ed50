"""Processes that tests start."""

import os
import socket
import subprocess
from collections.abc import Sequence


def one_device_flags() -> str:
    """XLA_FLAGS for one device, as on a small machine, whose programs are compiled as quickly as the suite's own."""
    return os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")


def environments(count: int) -> list[dict[str, str]]:
    """Of so many processes with one device each that find each other, as Open MPI starts them; of one it is alone."""
    alone = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device_flags()}
    if count == 1:
        return [alone]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **alone,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }
    return [{**common, "OMPI_COMM_WORLD_RANK": str(rank)} for rank in range(count)]


def wait_for(processes: Sequence[subprocess.Popen], deadline: float) -> list[str]:
    """What processes printed that end well, within so many seconds each; none is left running."""
    try:
        said = []
        for process in processes:
            out, errors = process.communicate(timeout=deadline)
            assert process.returncode == 0, errors
            said.append(out or "")
        return said
    finally:
        for process in processes:
            process.kill()
            process.wait()
