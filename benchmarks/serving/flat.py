"""Memory of the server over half an hour of conversations: it must be flat.

A server in a process of its own, and rounds of so many conversations at once, each three turns, until the minutes are
over. Behind each round the server's memory is read. The first rounds fill what is bounded: prefixes and conversations
that are kept. `wrong` counts answers that differ from those of a lone client.

    python -m benchmarks.serving.flat --model=FOLDER --minutes=30 --conversations=64
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import time
from pathlib import Path

import httpx2 as httpx

from benchmarks.reporting import report
from benchmarks.serving.load import CACHE, SUBJECTS, Target, load, one, server


def resident_mib(pid: int) -> float:
    """Of a process, without what it shares with files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def listening_pid(port: int) -> int:
    """The process that listens at a port of this machine."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--cache", default=CACHE)
    options = parser.parse_args()
    rows = []
    with server(options.model, options.cache, options.rows) as url:
        target, pid = Target(url), listening_pid(int(url.rsplit(":", 1)[1].strip("/")))
        alone = {subject: asyncio.run(one(target, subject, options.tokens))["answers"] for subject in SUBJECTS}
        began = time.monotonic()
        while time.monotonic() - began < 60 * options.minutes:
            talks = asyncio.run(load(target, options.conversations, options.tokens))
            wrong = sum(
                talk["answers"] != alone[subject]
                for subject, talk in zip(itertools.cycle(SUBJECTS), talks, strict=False)
            )
            names = [entry["id"] for entry in httpx.get(f"{url}/v1/conversations", timeout=60).json()["data"]]
            for name in names:  # as clients that are done with them do
                httpx.delete(f"{url}/v1/conversations/{name}", timeout=60)
            rows.append(
                {
                    "minutes": (time.monotonic() - began) / 60,
                    "conversations": len(talks),
                    "wrong": wrong,
                    "MiB of the server": resident_mib(pid),
                }
            )
    report("serving/flat", rows, note=f"{Path(options.model).name}, cache {options.cache}, {options.rows} rows.")


if __name__ == "__main__":
    main()
