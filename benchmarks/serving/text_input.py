"""Time to the first token of an answer: a text that is read while it comes, against one that is sent when it is over.

    python -m benchmarks.serving.text_input --model=FOLDER    # 2 idle cores: some 3 minutes

A server in a process of its own and a client over the loopback. A text of so many words comes at a pace, like speech.
`at the end`: the client waits for all of it and sends it as a chat, streamed. `as it comes`: it sends each piece over
the websocket (`/v1/streamjax/input`), and the model reads meanwhile. `ms` are from the text's last word to the first
piece of the answer, and `CPU ms` what the server computes in them, which other processes hardly change; medians of the
turns, which alternate. No two texts begin alike, so nothing is known of any. Rows are written as they come, and a run
that was ended goes on behind them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import openai
from websockets.sync.client import connect

import streamjax as sj
from benchmarks.reporting import Record
from benchmarks.serving.load import CACHE, server
from benchmarks.serving.process_usage import cpu_seconds, listening_pid
from benchmarks.serving.speculative import TEXT

QUESTION = " What is this text about?"
TOKENS = 16


def pieces(words: int, a_piece: int) -> list[str]:
    """A text of so many words and a question behind it, cut in front of blanks."""
    whole = (TEXT.split() * (1 + words // len(TEXT.split())))[:words] + QUESTION.split()
    return [
        (" " if start else "") + " ".join(whole[start : start + a_piece]) for start in range(0, len(whole), a_piece)
    ]


def spoken(text: list[str], seconds: float) -> Iterator[str]:
    """The pieces at their pace: each is there when it has been said."""
    began = time.perf_counter()
    for i, piece in enumerate(text, 1):
        time.sleep(max(began + i * seconds - time.perf_counter(), 0))
        yield piece


class Clock:
    """Milliseconds and CPU milliseconds of a process since it was made."""

    def __init__(self, pid: int):
        self._pid, self._cpu, self._wall = pid, cpu_seconds(pid), time.perf_counter()

    def read(self) -> tuple[float, float]:
        return 1e3 * (time.perf_counter() - self._wall), 1e3 * (cpu_seconds(self._pid) - self._cpu)


def at_the_end(url: str, model: str, text: list[str], seconds: float) -> tuple[float, float]:
    """What passes to the first piece of the answer where the text is sent when it is over."""
    pid = _pid(url)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600) as client:
        message = "".join(spoken(text, seconds))
        clock, found = Clock(pid), None
        for chunk in client.chat.completions.create(
            model=model, stream=True, temperature=0, max_tokens=TOKENS, messages=[{"role": "user", "content": message}]
        ):
            if found is None and chunk.choices and chunk.choices[0].delta.content:
                found = clock.read()
    assert found is not None
    return found


def as_it_comes(url: str, model: str, text: list[str], seconds: float) -> tuple[float, float]:
    """The same where it is sent while it comes."""
    pid = _pid(url)
    with connect(url.replace("http", "ws", 1) + "/v1/streamjax/input", open_timeout=60) as socket:
        socket.send(json.dumps({"begin": {"model": model, "temperature": 0, "max_tokens": TOKENS}}))
        for piece in spoken(text, seconds):
            clock = Clock(pid)
            socket.send(json.dumps({"text": piece}))
        socket.send(json.dumps({"answer": True}))
        found = None
        while not (message := json.loads(socket.recv(timeout=3600))).get("done"):
            if found is None and message["choices"][0]["delta"].get("content"):
                found = clock.read()
    assert found is not None
    return found


def _pid(url: str) -> int:
    return listening_pid(int(url.rsplit(":", 1)[1].strip("/")))


WAYS = {"at the end": at_the_end, "as it comes": as_it_comes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--words", type=int, nargs="+", default=[60, 240, 960], help="of a text")
    parser.add_argument("--words_a_second", type=float, default=20, help="people say some 3")
    parser.add_argument("--words_a_piece", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cache", default=CACHE)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer, name = sj.load_tokenizer(options.model), Path(options.model).name
    settings = {key: getattr(options, key) for key in ("words_a_second", "words_a_piece", "turns", "cache")}
    record = Record("serving/text_input", options.output, model=name, **settings)
    seconds = options.words_a_piece / options.words_a_second
    with server(options.model, options.cache, 4, "--chunk_size=64") as url:
        for words in options.words:
            if record.has(words=words, sent="as it comes"):
                continue
            text = pieces(words, options.words_a_piece)
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            for turn, (way, run) in itertools.product(range(options.turns), WAYS.items()):
                found[way].append(run(url, name, [f"{len(way)}, {turn}: {text[0]}", *text[1:]], seconds))
            tokens = len(tokenizer.encode("".join(text)))
            for way, both in found.items():
                ms, cpu = (round(statistics.median(each)) for each in zip(*both, strict=True))
                record.add({"words": words, "tokens": tokens, "sent": way, "ms": ms, "CPU ms": cpu})
    pace = f"{options.words_a_second:g} words a second, {options.words_a_piece} a piece"
    record.finish(note=f"{name}, cache {options.cache}, chunks of 64 tokens; {pace}.")


if __name__ == "__main__":
    main()
