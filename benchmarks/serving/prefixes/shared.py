"""A prefix that many requests share, read once: the engine with its tree of prefixes, and without.

    python -m benchmarks.serving.prefixes.shared --model FOLDER

Requests come at once. All begin with the same tokens, each goes on with 16 of its own, and draws one. One cache is
streaming_llm of 4 + 508, whose window has turned over when the requests part: what is forked is a state, and no list of
keys could be cut. With the other, dense, they share pages. Seconds are those until the last request has its token.
Without prefixes all requests cost the same, so --read_again of them are run, and counted up.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import streamjax as sj
from benchmarks.models.drawn import load_or_draw
from benchmarks.reporting import report
from streamjax.serving.requests import Request, Sampling, TokenLogprob

OWN, CHUNK = 16, 64


def serve(
    model: sj.Decoder, tokenizer: Any, cache: Any, requests: list[Request], prefix_bytes: int
) -> tuple[list[TokenLogprob], int, float, float]:
    """What was drawn, tokens that were read, wall and CPU seconds."""
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


def _tokens(drawn: list[TokenLogprob]) -> list[int]:
    return [one.token for one in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in Hugging Face's layout; drawn weights by default")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens that all requests share")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--read_again", type=int, default=2, help="requests that are run without prefixes")
    arguments = parser.parse_args()
    model, tokenizer = load_or_draw(arguments.model)
    draw = np.random.default_rng(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, model.config.vocab_size, count).tolist())

    shared = ids(arguments.prefix)
    requests = [Request(shared + ids(OWN), 1, Sampling(temperature=0), logprobs=5) for _ in range(arguments.requests)]
    some = min(arguments.read_again, arguments.requests)
    runs = {"kept": (requests, 1 << 30), "not kept": (requests[:some], 0)}
    caches = {
        "streaming_llm": sj.kv.preset("streaming_llm", sinks=4, window=508),
        "dense": sj.kv.preset("dense", capacity=arguments.prefix + 2 * OWN),
    }
    rows = []
    for cache in caches:
        found = {name: serve(model, tokenizer, caches[cache], *run) for name, run in runs.items()}
        plain, _, _, cpu_again = found["not kept"]
        for name, (drawn, read, seconds, cpu) in found.items():
            of_all = cpu * arguments.requests / len(runs[name][0])
            rows.append(
                {
                    "cache": cache,
                    "shared tokens": arguments.prefix,
                    "prefixes": name,
                    "requests": len(runs[name][0]),
                    "tokens read": read,
                    "seconds": seconds,
                    "CPU seconds": cpu,
                    "CPU seconds of all": of_all,
                    "times less CPU": cpu_again * arguments.requests / some / of_all,
                    "tokens": "the same" if _tokens(drawn)[:some] == _tokens(plain) else "others",
                    "log-probabilities": "the same bits" if drawn[:some] == plain else "others",
                }
            )
    report("serving/prefixes/shared", rows)


if __name__ == "__main__":
    main()
