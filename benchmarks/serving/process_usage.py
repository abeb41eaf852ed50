"""What other processes of this machine take: memory and CPU time, by Linux's /proc."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def listening_pid(port: int) -> int:
    """The process that listens at a port of this machine.

    Raises:
      RuntimeError: nobody does whom this process may look at.
    """
    wanted = f"{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    inodes = {line.split()[9] for line in lines if line.split()[1].endswith(f":{wanted}") and line.split()[3] == "0A"}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if any(f"socket:[{inode}]" == str(link.readlink()) for inode in inodes):
                return int(link.parts[2])
        except OSError:  # it has gone, or is not ours
            continue
    raise RuntimeError(f"nobody listens at port {port}")


def resident_mib(pid: int) -> float:
    """Of a process, without what it shares with files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process and of those that it has started, so far."""
    parents, spent = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()  # behind the name, which may have blanks
        except OSError:  # it has gone
            continue
        one = int(entry.parts[2])
        parents[one], spent[one] = int(fields[1]), sum(map(int, fields[11:15])) / _TICKS  # with children that ended
    total = 0.0
    for one, seconds in spent.items():
        above: int | None = one
        while above is not None and above != pid:
            above = parents.get(above)
        total += seconds if above == pid else 0.0
    return total


def thread_cpu_seconds(pid: int, thread: int) -> float:
    """Of one thread of a process; the one that a program begins with has the process's number."""
    fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / _TICKS
