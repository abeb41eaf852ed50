"""Conversations at once against the server.

A server in a process of its own, and a client with so many conversations at once over the loopback, three turns each,
in which only the new message is sent. Every answer is greedy and of a fixed number of tokens, and is compared with what
the same turns give when nobody else is there: `wrong` counts answers that differ. First token: from the request to its
first piece of text; between: from a piece to the next. The load average says how much else the machine does.

    python -m benchmarks.serving.load --model=FOLDER --conversations=1,16,64
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai

from benchmarks.reporting import report

_TURNS = ("Tell me about {}.", "Why is that so? Think of {}.", "Sum it up in a list.")
_SUBJECTS = ("rivers", "bread", "chess", "the moon", "copper", "glass", "bees", "ships")
_CACHE = "streaming_llm:sinks=4,window=508"


@contextlib.contextmanager
def server(model: str, cache: str, rows: int) -> Iterator[str]:
    """A server of a model, in a process of its own; its address."""
    command = [
        sys.executable,
        "-m",
        "infer.serve",
        f"--model={model}",
        f"--cache={cache}",
        f"--rows={rows}",
        "--port=0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"serving at (\S+)", line):
                    yield found[1]
                    break
            else:
                raise RuntimeError(f"the server has ended: {lines[-1] if lines else 'it said nothing'}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()


async def converse(client: openai.AsyncOpenAI, model: str, name: str, subject: str, tokens: int) -> dict:
    """The turns of one conversation: the answers, and the seconds of each piece."""
    first, between, answers = [], [], []
    for turn in _TURNS:
        last, text = time.perf_counter(), ""
        stream = await client.chat.completions.create(
            model=model, stream=True, temperature=0, max_tokens=tokens,
            messages=[{"role": "user", "content": turn.format(subject)}], extra_body={"conversation": name},
        )  # fmt: skip
        begun = False
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                now = time.perf_counter()
                (between if begun else first).append(now - last)
                last, begun = now, True
                text += chunk.choices[0].delta.content
        answers.append(text)
    return {"first": first, "between": between, "answers": answers}


async def load(url: str, count: int, tokens: int) -> list[dict]:
    """So many conversations at once."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600) as client:
        model = (await client.models.list()).data[0].id
        stamp = time.time_ns()
        subjects = itertools.islice(itertools.cycle(_SUBJECTS), count)
        talks = [converse(client, model, f"load-{stamp}-{i}", subject, tokens) for i, subject in enumerate(subjects)]
        return await asyncio.gather(*talks)


def percentile(values: list[float], share: int) -> float:
    """In milliseconds."""
    return 1000 * (statistics.quantiles(values, n=100)[share - 1] if len(values) > 1 else values[0])


def measure(url: str, counts: list[int], tokens: int) -> list[dict]:
    """A row a number of conversations."""
    alone: dict[str, list[str]] = {}
    for subject, found in zip(
        _SUBJECTS, (asyncio.run(one(url, subject, tokens)) for subject in _SUBJECTS), strict=True
    ):
        alone[subject] = found["answers"]
    rows = []
    for count in counts:
        began = time.perf_counter()
        found = asyncio.run(load(url, count, tokens))
        seconds = time.perf_counter() - began
        wrong = sum(
            answer != right
            for subject, talk in zip(itertools.cycle(_SUBJECTS), found, strict=False)
            for answer, right in zip(talk["answers"], alone[subject], strict=True)
        )
        first = [value for talk in found for value in talk["first"]]
        between = [value for talk in found for value in talk["between"]]
        rows.append({
            "conversations": count, "answers": count * len(_TURNS), "wrong": wrong,
            "first token p50, ms": percentile(first, 50), "p99, ms": percentile(first, 99),
            "between p50, ms": percentile(between, 50), "p99 of that, ms": percentile(between, 99),
            "pieces a second": (len(first) + len(between)) / seconds, "load average": round(os.getloadavg()[0], 1),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


async def one(url: str, subject: str, tokens: int) -> dict:
    """A conversation that nobody disturbs."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600) as client:
        model = (await client.models.list()).data[0].id
        return await converse(client, model, f"alone-{time.time_ns()}", subject, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache", default=_CACHE)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--conversations", default="1,16,64")
    parser.add_argument("--url", help="of a server that is there; one is started otherwise")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    counts = [int(count) for count in options.conversations.split(",")]
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(server(options.model, options.cache, options.rows))
        rows = measure(url, counts, options.tokens)
    about = (
        f"{Path(options.model).name}, cache {options.cache}, {options.rows} rows, {options.tokens} tokens an answer."
    )
    report("serving/load", rows, options.output, note=about)


if __name__ == "__main__":
    main()
