"""Prefill and decode of one GGUF file: streamjax with weights of several kinds, and llama.cpp.

    python -m benchmarks.models.vs_llama_cpp --model FILE.gguf --python PATH   # PATH: a Python that has llama_cpp

llama.cpp comes as `pip install llama-cpp-python`, best into an environment of its own. There is no wheel on PyPI: pip
compiles it, which wants a C++ compiler and takes some 10 CPU minutes. Each side has processes of its own, in turn, as
in `benchmarks.models.vs_transformers`, with the same work: one stream, all cores, prefill of 1,024 tokens, then greedy
decoding over them. llama.cpp multiplies codes of 4 bits by activations that it rounds to 8 bits; streamjax rounds no
activations, and float32 is what the file's codes stand for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.reporting import in_own_process, median_ratio, report

MODULE = "benchmarks.models.vs_llama_cpp"
PEER = "llama.cpp"
SIDES = (PEER, "streamjax, int4", "streamjax, int8", "streamjax, float32")
CACHED, NEW = 1024, 32
Phases = dict[str, Callable[[], Any]]


def prompt(vocab_size: int) -> np.ndarray:
    """[1, CACHED] token ids."""
    return np.random.default_rng(0).integers(0, vocab_size, (1, CACHED)).astype(np.int32)


def llama_phases(file: str) -> Phases:
    """llama.cpp, through its Python package's low-level calls."""
    from llama_cpp import Llama

    cores = len(os.sched_getaffinity(0))
    model = Llama(file, n_ctx=CACHED + NEW, n_threads=cores, n_threads_batch=cores, verbose=False)
    tokens = prompt(model.n_vocab())[0].tolist()

    def prefill() -> None:
        model.reset()
        model.eval(tokens)

    def decode() -> None:
        model.n_tokens = CACHED  # what lies behind is dropped by the next call
        for _ in range(NEW):
            model.eval([model.sample(temp=0.0)])

    return {"prefill": prefill, "decode": decode}


def our_phases(file: str, kind: str) -> Phases:
    """streamjax, from a full endless cache."""
    import jax

    import streamjax as sj

    model = sj.load(file, dtype="float32", weights=None if kind == "float32" else kind)
    tokens, nothing = prompt(model.config.vocab_size), np.zeros((1, 0), np.int32)
    cache, greedy = sj.kv.preset("streaming_llm", sinks=4, window=CACHED - 4), sj.Sampler(temperature=0)
    filled: dict[str, Any] = {}

    def prefill() -> None:
        state = sj.init_state(model, cache)
        filled["state"] = jax.block_until_ready(sj.read(model, state, tokens))

    def decode() -> None:
        filled["state"], out = sj.generate(model, filled["state"], nothing, max_new_tokens=NEW, sampler=greedy)
        jax.block_until_ready(out)

    return {"prefill": prefill, "decode": decode}


def measure(side: str, file: str, turns: int) -> dict[str, Any]:
    """Seconds and CPU seconds of each phase, medians over turns behind one that warms up; the load average before."""
    phases = llama_phases(file) if side == PEER else our_phases(file, side.rpartition(" ")[2])
    for run in phases.values():
        run()
    found: dict[str, Any] = {"load": os.getloadavg()[0]}
    for phase, run in phases.items():
        wall, cpu = [], []
        for _ in range(turns):
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        found[phase] = [statistics.median(wall), statistics.median(cpu)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--python", default=sys.executable, help="a Python that has llama_cpp; this one by default")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side; the median counts")
    parser.add_argument("--turns", type=int, default=5, help="turns of a process, behind one that warms up")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.model, arguments.turns)))
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    options = ("--model", arguments.model, "--turns", arguments.turns)
    for turn, side in itertools.product(range(arguments.rounds), SIDES):
        python = arguments.python if side == PEER else sys.executable
        found[side].append(in_own_process(MODULE, *options, "--child", side, python=python))
        print(f"round {turn + 1} of {arguments.rounds}, {side}: {found[side][-1]}", flush=True)
    rows = []
    for (phase, tokens), side in itertools.product((("prefill", CACHED), ("decode", NEW)), SIDES):
        wall = {name: [one[phase][0] for one in runs] for name, runs in found.items()}
        seconds = statistics.median(wall[side])
        rows.append(
            {
                "phase": phase,
                "side": side,
                "seconds": seconds,
                "CPU seconds": statistics.median(one[phase][1] for one in found[side]),
                "tokens/s": tokens / seconds,
                "llama.cpp's time / this": median_ratio(wall[PEER], wall[side]),
                "load": max(one["load"] for one in found[side]),
            }
        )
    report("models/vs_llama_cpp", rows, rounds=arguments.rounds, turns=arguments.turns)


if __name__ == "__main__":
    main()
