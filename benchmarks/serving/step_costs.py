"""Where the time of a served token goes: the model's layers, its logits, the choice of tokens, Python, HTTP.

    python -m benchmarks.serving.step_costs --model=FOLDER

CPU milliseconds of all threads, of an iteration in which every row of the engine draws a token and no prompt is read:
greedy, float32, 4 sinks and a window of 508 tokens. `layers`: the compiled step without logits; `of it, cache`: what is
saved with a window of 60 in its place; `logits`: of all rows; `choice`: the rest of the compiled program, which chooses
tokens and notes them; `Python`: the rest of the iteration, text and events included. `HTTP`: of the thread that talks
to as many clients, in a server of its own, for as many tokens. `ms`: of such an iteration, by the clock. Figures are
medians, and all but the clock's do not depend on what else the machine does. It takes some 4 minutes on 2 idle cores.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import Record
from benchmarks.serving.load import CACHE, Target, load, server
from benchmarks.serving.process_usage import listening_pid, thread_cpu_seconds
from streamjax.serving.batch import Batch
from streamjax.serving.requests import Request, Sampling
from streamjax.serving.row_sampling import one_row
from streamjax.streaming.step import advance

GREEDY = Sampling(temperature=0)
SLOTS, FEW_SLOTS = 508, 60  # of the window, behind 4 sinks
TOKENS = 24  # of an answer, over HTTP


def spent(run: Callable[[], Any], turns: int) -> tuple[float, float]:
    """CPU and clock milliseconds of a run, medians; the first one is not counted."""
    cpu, clock = [], []
    for turn in range(turns + 1):
        start = time.process_time(), time.perf_counter()
        jax.block_until_ready(run())
        if turn:
            cpu.append(1e3 * (time.process_time() - start[0]))
            clock.append(1e3 * (time.perf_counter() - start[1]))
    return statistics.median(cpu), statistics.median(clock)


def layers_alone(model: sj.Decoder, window: int, rows: int, turns: int) -> float:
    """CPU milliseconds of a token of each row, without logits."""
    step = jax.jit(lambda model, state, tokens: advance(model, state, tokens)[0], donate_argnums=1)
    held = [sj.init_state(model, sj.kv.preset("streaming_llm", sinks=4, window=window), rows, note_used=True)]
    tokens = jnp.full((rows, 1), 5, jnp.int32)

    def run() -> Any:
        held[0] = step(model, held[0], tokens)
        return held[0].hidden

    return spent(run, turns)[0]


def whole_program(model: sj.Decoder, rows: int, turns: int) -> float:
    """CPU milliseconds of the engine's program for a token of each row."""
    batch = Batch(model, sj.kv.preset("streaming_llm", sinks=4, window=SLOTS), rows, 64, 1)
    request = Request((5,), turns + 2, GREEDY)
    for row in range(rows):
        stream, _ = batch.read(batch.fresh(), np.array([5], np.int32))
        batch.enter(row, stream, one_row(request, [], model.config.vocab_size))
    return spent(lambda: jax.device_get(batch.decode(np.ones(rows, bool), 1)), turns)[0]


def iteration(model: sj.Decoder, tokenizer: Any, rows: int, turns: int) -> tuple[float, float]:
    """CPU and clock milliseconds of an engine's iteration, all rows drawing."""
    cache = sj.kv.preset("streaming_llm", sinks=4, window=SLOTS)
    engine = sj.Engine(model, tokenizer, cache, rows=rows, prefix_bytes=0)
    engine.warm_up()
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, 8)).tolist()
    for prompt in prompts:
        engine.submit(Request(tuple(prompt), 2 * rows + turns + 8, GREEDY))
    while engine.stats().running < rows:  # prompts are read one after another
        engine.step()
    found = spent(engine.step, turns)
    engine.close()
    return found


def http_milliseconds(folder: str, rows: int) -> float:
    """CPU milliseconds of the thread that talks to clients, for a token of as many clients as there are rows."""
    with server(folder, CACHE, rows) as url:
        pid = listening_pid(urlsplit(url).port or 0)
        asyncio.run(load(Target(url), 1, 4))
        before = thread_cpu_seconds(pid, pid)
        talks = asyncio.run(load(Target(url), rows, TOKENS))
        return 1e3 * rows * (thread_cpu_seconds(pid, pid) - before) / max(sum(talk.tokens for talk in talks), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model, dtype="float32"), sj.load_tokenizer(arguments.model)
    record = Record("serving/step_costs", arguments.output, model=Path(arguments.model).name, turns=arguments.turns)
    logits = jax.jit(lambda model, hidden: model.logits(hidden))
    for rows in arguments.rows:
        if record.has(rows=rows):
            continue
        layers = layers_alone(model, SLOTS, rows, arguments.turns)
        few = layers_alone(model, FEW_SLOTS, rows, arguments.turns)
        hidden = jnp.ones((rows, 1, model.config.d_model), model.dtype)
        words = spent(partial(logits, model, hidden), arguments.turns)[0]
        program = whole_program(model, rows, arguments.turns)
        cpu, clock = iteration(model, tokenizer, rows, arguments.turns)
        record.add({
            "rows": rows, "CPU ms": cpu, "layers": layers, "of it, cache": layers - few, "logits": words,
            "choice": program - layers - words, "Python": cpu - program,
            "HTTP": http_milliseconds(arguments.model, rows), "ms": clock, "CPU ms a token": cpu / rows,
        })  # fmt: skip
    record.finish(note=f"{arguments.turns} iterations.")


if __name__ == "__main__":
    main()
