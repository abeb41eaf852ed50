"""Decoding over 8,064 cached tokens whose keys and values are codes, on a CPU: against float32 slots, turn by turn.

    python -m benchmarks.caches.real_model.coded_decode --model=FOLDER    # some CPU minutes

The first layers of SmolLM2-135M-Instruct in float32 (`--layers`), each with `Full(8192)` slots that hold drawn keys and
values; `comet` is `Int(4)`. A turn is 16 tokens, one after the other; sides take turns in one process, and `x float32`
is the median over turns of CPU seconds of all threads, by those of float32 in the same turn. `cached, MB` are the live
buffers of the state. Time alone: what is drawn has nothing to be found.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import streamjax as sj
from benchmarks.caches.codecs import CACHED, CODECS, DECODED, by_layers, filled
from benchmarks.reporting import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--codecs", nargs="+", default=["float32", "int8", "comet"], choices=list(CODECS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model = sj.load(arguments.model, dtype="float32")
    model.layers = nnx.List(list(model.layers)[: arguments.layers])
    model.config = model.config.replace(blocks=model.config.blocks[: arguments.layers])
    states = {name: filled(model, by_layers(model, name, np.zeros((1, 0), np.int32))) for name in arguments.codecs}
    token, spent = np.array([[5]], np.int32), {name: [] for name in states}
    for turn in range(arguments.turns + 1):
        for name, state in states.items():
            start = time.process_time()
            for _ in range(DECODED):
                state, _ = sj.step(model, state, token)
            jax.block_until_ready(state)
            states[name] = state
            if turn:  # the first one compiles
                spent[name].append((time.process_time() - start) / DECODED)
    first = spent[arguments.codecs[0]]
    rows = [
        {
            "slots": name,
            "cached, MB": states[name].cache_bytes / 1e6,
            "CPU ms a token": 1e3 * statistics.median(found),
            "x float32": statistics.median(a / b for a, b in zip(found, first, strict=True)),
        }
        for name, found in spent.items()
    ]
    report(
        "caches/real_model/coded_decode",
        rows,
        arguments.output,
        layers=arguments.layers,
        cached=CACHED,
        turns=arguments.turns,
    )


if __name__ == "__main__":
    main()
