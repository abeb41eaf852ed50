"""A prefix that many requests share, read once: the engine with its tree of prefixes, and without.

    python -m benchmarks.serving.prefixes --model FOLDER

Requests come at once. All begin with the same tokens, each goes on with 16 of its own, and draws one. The cache is
streaming_llm of 4 + 508, so behind 1,024 tokens its window has turned over when the requests part: what is forked is a
state, and no list of keys could be cut. Seconds are those until the last request has its token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import numpy as np

import streamjax as sj
from benchmarks.models.drawn import SMOLLM2, write_drawn
from benchmarks.reporting import report
from streamjax.serving.requests import Request, Sampling, TokenLogprob

OWN, CHUNK = 16, 64


def serve(
    model: sj.Decoder, tokenizer: Any, requests: list[Request], prefix_bytes: int
) -> tuple[list[TokenLogprob], int, float, float]:
    """What was drawn, tokens that were read, wall and CPU seconds."""
    cache = sj.kv.preset("streaming_llm", sinks=4, window=508)
    engine = sj.Engine(model, tokenizer, cache, rows=4, chunk_size=CHUNK, prefix_bytes=prefix_bytes)
    engine.warm_up()
    start, start_cpu = time.perf_counter(), time.process_time()
    tickets = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    drawn = [one for ticket in tickets for event in ticket.events() for one in event.logprobs]
    read = engine.stats().prompt_tokens
    engine.close()
    return drawn, read, seconds, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in Hugging Face's layout; drawn weights by default")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens that all requests share")
    parser.add_argument("--requests", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            write_drawn(SMOLLM2, folder)
        path = arguments.model or folder
        model, tokenizer = sj.load(path, dtype="float32"), sj.load_tokenizer(path)
    draw = np.random.default_rng(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, model.config.vocab_size, count).tolist())

    shared = ids(arguments.prefix)
    requests = [Request(shared + ids(OWN), 1, Sampling(temperature=0), logprobs=5) for _ in range(arguments.requests)]
    found = {name: serve(model, tokenizer, requests, size) for name, size in (("kept", 1 << 30), ("not kept", 0))}
    rows = [
        {
            "requests": arguments.requests,
            "shared tokens": arguments.prefix,
            "prefixes": name,
            "tokens read": read,
            "seconds": seconds,
            "CPU seconds": cpu,
            "times less CPU": found["not kept"][3] / cpu,
            "tokens and log-probabilities": "the same bits" if drawn == found["not kept"][0] else "others",
        }
        for name, (drawn, read, seconds, cpu) in found.items()
    ]
    report("serving/prefixes", rows)


if __name__ == "__main__":
    main()
