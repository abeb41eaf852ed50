"""Memory of the server over half an hour of conversations: it must be flat.

A server in a process of its own, and rounds of so many conversations at once, each three turns, until the minutes are
over. Behind each round the server's memory is read, and the most that it had in the round. The first rounds fill what
is bounded: prefixes and conversations that are kept. `wrong` counts answers that differ from those of a client that is
alone, `errors` those that did not come.

    python -m benchmarks.serving.memory.flat --model=FOLDER --minutes=30 --conversations=64

It takes its minutes, and those of its last round. Rows are written round by round, so what an ended run has found is
there; the next one begins with a new server, and anew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
from tqdm import tqdm

from benchmarks.reporting import Record
from benchmarks.serving.load import CACHE, Target, alone, load, server, wrong
from benchmarks.serving.process_usage import listening_pid, resident_mib


@contextlib.contextmanager
def watched(pid: int) -> Iterator[list[float]]:
    """A process's MiB, once a second."""
    found, over = [resident_mib(pid)], threading.Event()

    def watch() -> None:
        while not over.wait(1):
            found.append(resident_mib(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--cache", default=CACHE)
    parser.add_argument("--with", dest="more", action="append", default=[], metavar="FLAG", help="of the server, as "
                        "fused; several times")  # fmt: skip
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("cache", "conversations", "tokens")}
    settings["rows of the server"], settings["with"] = options.rows, options.more
    flags = [f"--{flag}" for flag in options.more]
    record = Record("serving/memory/flat", options.output, model=Path(options.model).name, resumes=False, **settings)
    minutes = tqdm(
        total=options.minutes, unit="min", bar_format="{l_bar}{bar}| {n:.1f} of {total:.0f} minutes{postfix}"
    )
    with minutes as bar, server(options.model, options.cache, options.rows, *flags) as url:
        target, pid = Target(url), listening_pid(int(url.rsplit(":", 1)[1].strip("/")))
        right = asyncio.run(alone(target, options.tokens))
        began = time.monotonic()
        while (time.monotonic() - began) / 60 < options.minutes:
            with watched(pid) as mib:
                talks = asyncio.run(load(target, options.conversations, options.tokens))
            names = [entry["id"] for entry in httpx.get(f"{url}/v1/conversations", timeout=60).json()["data"]]
            for name in names:  # as clients that are done with them do
                httpx.delete(f"{url}/v1/conversations/{name}", timeout=60)
            now = (time.monotonic() - began) / 60
            record.add({
                "minutes": now, "answers": sum(len(talk.answers) for talk in talks),
                "errors": sum(talk.errors for talk in talks), "wrong": wrong(talks, right),
                "MiB of the server": resident_mib(pid), "most in the round": max(mib),
            })  # fmt: skip
            bar.update(min(now, options.minutes) - bar.n)  # tqdm forgets a total that is passed
    about = f"{options.conversations} conversations at once, {options.tokens} tokens an answer"
    record.finish(note=f"{Path(options.model).name}, cache {options.cache}, {options.rows} rows; {about}.")


if __name__ == "__main__":
    main()
