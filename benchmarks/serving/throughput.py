"""Conversations at once through the engine: tokens a second, and how long each waits for its tokens.

    python -m benchmarks.serving.throughput --model FOLDER

As many clients as the engine has rows, each with a conversation of its own. A client sends a turn of 64 tokens, waits
for the 24 tokens of the answer, and sends the next; all begin at the same moment, so the first tokens of the last
client wait for the prompts of all others. Greedy, in float32, with a streaming_llm cache of 4 + 508. Times are from the
events: from a turn's submission to its first token, and from one token to the next. The last column says whether every
client got the tokens that it got from a smaller engine, the first of them from one where it was alone. CPU seconds are
those of all threads, prompts included. The engine runs in the benchmark's own process.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import streamjax as sj
from benchmarks.models.drawn import SMOLLM2, load_or_draw
from benchmarks.reporting import report
from streamjax.serving.requests import Event, Request, Sampling

PROMPT, NEW, TURNS, CHUNK = 64, 24, 2, 64


class Client:
    """One conversation: turn after turn, noting when tokens come."""

    def __init__(self, engine: sj.Engine, index: int, vocab: int):
        draw = np.random.default_rng(index)
        self.engine, self.name, self.left = engine, f"client {index}", TURNS
        self.turns = [tuple(draw.integers(0, vocab, PROMPT).tolist()) for _ in range(TURNS)]
        self.tokens: list[int] = []
        self.first: list[float] = []
        self.between: list[float] = []
        self.over = threading.Event()

    def go_on(self) -> None:
        """Send the next turn."""
        if not self.left:
            self.over.set()
            return
        request = Request(self.turns[TURNS - self.left], NEW, Sampling(temperature=0), conversation=self.name)
        self.left -= 1
        self.last, self.answered = time.perf_counter(), False
        self.engine.submit(request, self.hear)

    def hear(self, event: Event) -> None:
        """Take a piece of an answer."""
        if event.tokens:
            now = time.perf_counter()
            (self.between if self.answered else self.first).append(now - self.last)
            self.last, self.answered = now, True
            self.tokens += event.tokens
        if event.finish_reason is not None:
            self.go_on()


def serve(model: sj.Decoder, tokenizer: Any, rows: int, clients: Sequence[int]) -> tuple[list[Client], float, float]:
    """The clients when all have been served, and the wall and CPU seconds that it took."""
    cache = sj.kv.preset("streaming_llm", sinks=4, window=508)
    engine = sj.Engine(model, tokenizer, cache, rows=rows, chunk_size=CHUNK, prefix_bytes=0)
    engine.warm_up()
    engine.start()
    made = [Client(engine, index, model.config.vocab_size) for index in clients]
    start, start_cpu = time.perf_counter(), time.process_time()
    for client in made:
        client.go_on()
    for client in made:
        client.over.wait()
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    engine.close()
    return made, seconds, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in Hugging Face's layout; drawn weights by default")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    arguments = parser.parse_args()
    model, tokenizer = load_or_draw(arguments.model)
    alone: dict[str, list[int]] = {}
    rows = []
    for count in arguments.rows:
        clients, seconds, cpu = serve(model, tokenizer, count, range(count))
        for client in clients:
            alone.setdefault(client.name, client.tokens)  # of the smallest engine that had it
        first = [1e3 * one for client in clients for one in client.first]
        between = [1e3 * one for client in clients for one in client.between]
        drawn = sum(len(client.tokens) for client in clients)
        rows.append(
            {
                "rows and clients": count,
                "tokens/s": drawn / seconds,
                "read and drawn tokens/s": (drawn + count * TURNS * PROMPT) / seconds,
                "CPU ms a drawn token": 1e3 * cpu / drawn,
                "first token p50 ms": float(np.percentile(first, 50)),
                "first token p99 ms": float(np.percentile(first, 99)),
                "between tokens p50 ms": float(np.percentile(between, 50)),
                "between tokens p99 ms": float(np.percentile(between, 99)),
                "as in a smaller engine": all(client.tokens == alone[client.name] for client in clients),
            }
        )
    report("serving/throughput", rows, model=SMOLLM2 if arguments.model is None else "a folder")


if __name__ == "__main__":
    main()
