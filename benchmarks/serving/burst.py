"""Ten thousand requests in a burst: those that do not fit are told to come again, and nobody who is served notices.

A server in a process of its own, one client who streams an answer, and then so many requests over connections of their
own, some hundred at a time. Counted are the answers by status, how many of those with 429 bring Retry-After, and the
streaming client's longest gap between two pieces before the burst and in it, where it also waits for its next answer
in the same queue. It takes a minute on 2 idle cores, most of it until the server is there.

    python -m benchmarks.serving.burst --model=FOLDER --requests=10000
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import time
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from benchmarks.reporting import report
from benchmarks.serving.load import CACHE, Target, server

_AT_ONCE = 500  # connections


async def ask(host: str, port: int, body: bytes) -> tuple[int, bool]:
    """One request over a connection of its own: the status, 0 where the connection broke, and whether to come again."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        answer = await reader.read()
        writer.close()
    except OSError:
        return 0, False
    head, _, _ = answer.decode(errors="replace").partition("\r\n\r\n")
    return int(head.split()[1]) if head else 0, "\nretry-after:" in head.lower()


async def stream(target: Target, gaps: list[float], over: asyncio.Event) -> None:
    """One answer after another until `over`, and the seconds between pieces."""
    async with target.client() as client:
        model = await target.model(client)
        while not over.is_set():
            last = time.perf_counter()
            pieces = await client.completions.create(model=model, prompt="Once", max_tokens=64, stream=True)
            async for _ in pieces:
                gaps.append(time.perf_counter() - last)
                last = time.perf_counter()


async def burst(url: str, count: int) -> dict[str, float | int]:
    """The burst, and what came of it."""
    target, parts = Target(url), urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    host, port = parts.hostname, parts.port
    async with target.client() as client:
        body = json.dumps({"model": await target.model(client), "prompt": "Hello", "max_tokens": 4}).encode()
    gaps: list[float] = []
    over, door = asyncio.Event(), asyncio.Semaphore(_AT_ONCE)
    streaming = asyncio.create_task(stream(target, gaps, over))
    while len(gaps) < 100:
        await asyncio.sleep(0.01)
    before = len(gaps)

    began = time.perf_counter()
    with tqdm(total=count, unit="request", mininterval=1) as bar:

        async def one() -> tuple[int, bool]:
            async with door:
                found = await ask(host, port, body)
            bar.update()
            return found

        found = await asyncio.gather(*(one() for _ in range(count)))
    seconds = time.perf_counter() - began
    over.set()
    await streaming
    statuses = collections.Counter(status for status, _ in found)
    return {
        "requests": count,
        "seconds": seconds,
        "answered": statuses[200],
        "429": statuses[429],
        "with Retry-After": sum(again for _, again in found),
        "others": count - statuses[200] - statuses[429],
        "longest gap before, s": max(gaps[1:before]),
        "longest gap in it, s": max(gaps[before:], default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max_requests", type=int, default=64, help="that the server takes at once")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with server(options.model, CACHE, options.rows, f"--max_requests={options.max_requests}") as url:
        row = asyncio.run(burst(url, options.requests))
    note = f"{Path(options.model).name}, {options.rows} rows, {options.max_requests} requests in the server at once."
    report("serving/burst", [row], options.output, note=note)


if __name__ == "__main__":
    main()
