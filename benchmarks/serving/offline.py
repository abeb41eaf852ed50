"""A file of requests in the order of `infer.batch`, and in the file's own: requests a second.

    python -m benchmarks.serving.offline --model FOLDER

Six prompts of 256 tokens are each shared by four requests with 16 tokens of their own. Of three of them the answers
have one token, of the others 24. The file has them shuffled. There is memory for the states of two prefixes, as there
would be for a few of many. The cache is streaming_llm of 4 + 508.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import streamjax as sj
from benchmarks.models.drawn import load_or_draw
from benchmarks.reporting import report
from streamjax.serving.offline.ordering import order_requests
from streamjax.serving.requests import Request, Sampling

ROWS, CHUNK, OWN, LONG = 4, 64, 16, 24


def serve(
    model: sj.Decoder, tokenizer: Any, requests: list[Request], prefix_bytes: int
) -> tuple[list[list[int]], sj.Engine, float, float]:
    """What each request drew, the engine behind them, wall and CPU seconds."""
    cache = sj.kv.preset("streaming_llm", sinks=4, window=508)
    engine = sj.Engine(model, tokenizer, cache, rows=ROWS, chunk_size=CHUNK, prefix_bytes=prefix_bytes)
    engine.warm_up()
    start, start_cpu = time.perf_counter(), time.process_time()
    tickets: list[Any] = []
    waiting = list(requests)
    while engine.step() or waiting:
        while waiting and sum(not ticket.finished for ticket in tickets) < 2 * ROWS:
            tickets.append(engine.submit(waiting.pop(0)))
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    drawn = [[token for event in ticket.events() for token in event.tokens] for ticket in tickets]
    engine.close()
    return drawn, engine, seconds, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in Hugging Face's layout; drawn weights by default")
    parser.add_argument("--prefix", type=int, default=256, help="tokens that four requests share")
    arguments = parser.parse_args()
    model, tokenizer = load_or_draw(arguments.model)
    draw = np.random.default_rng(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, model.config.vocab_size, count).tolist())

    shared = [ids(arguments.prefix) for _ in range(6)]
    greedy = Sampling(temperature=0)
    file = [Request(shared[i % 6] + ids(OWN), LONG if i % 6 >= 3 else 1, greedy) for i in range(24)]
    file = [file[i] for i in draw.permutation(len(file))]
    best = order_requests([one.prompt for one in file], [one.max_new_tokens for one in file], CHUNK, ROWS)
    per_token = 2 * model.config.num_layers * model.config.blocks[0].attention.num_kv_heads
    state = arguments.prefix * per_token * model.config.blocks[0].attention.head_dim * 4
    rows, texts = [], {}
    for name, order in (("file", list(range(len(file)))), ("infer.batch", best)):
        drawn, engine, seconds, cpu = serve(model, tokenizer, [file[i] for i in order], int(2.5 * state))
        texts[name] = {i: tuple(tokens) for i, tokens in zip(order, drawn, strict=True)}
        rows.append(
            {
                "order": name,
                "requests": len(file),
                "tokens read": engine.stats().prompt_tokens,
                "seconds": seconds,
                "CPU seconds": cpu,
                "requests a CPU second": len(file) / cpu,
                "tokens": "the same" if texts[name] == texts["file"] else "others",
            }
        )
    report("serving/offline", rows)


if __name__ == "__main__":
    main()
