"""Perplexity of a real model over caches that keep tokens by a score, all of the same slots.

    python -m benchmarks.caches.scored_perplexity --model=FOLDER

SmolLM2-135M-Instruct reads the text of Python's own help topics (`pydoc_data.topics`) as one stream. Each cache has
as many slots in every layer, those that wait for a choice and the windows in front included. `nats` are a token's, on
average, over the tokens behind the first 1,024, where every cache has long been full; `tokens/CPU s` counts a
second reading of the same text, compiled. `dense` keeps everything.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np

import streamjax as sj
from benchmarks.reporting import report

SKIPPED = 1024


def caches(slots: int, every: int) -> dict[str, sj.kv.Cache]:
    """Every cache of so many slots in all; half of H2O's are its window, as published."""
    kept = slots - every
    sizes = {
        "streaming_llm": {"sinks": 4, "window": slots - 4},
        "h2o": {"window": kept // 2, "size": kept - kept // 2, "every": every},
        "scissorhands": {"window": every, "size": kept - every, "every": every},
        "snapkv": {"window": 32, "size": kept - 32, "every": every},
        "tova": {"size": kept, "every": every},
        "knorm": {"size": kept, "every": every},
        "keydiff": {"size": kept, "every": every},
        "qfilters": {"window": 64, "size": kept - 64, "every": every},
        "leverage": {"size": kept - 12, "every": every},
        "curdkv": {"size": kept - 4, "every": every},
        "kvzip": {"size": kept - 4, "every": every},
        "chunkkv": {"window": 32, "size": kept - 32, "chunk": 16, "every": every},
        "windowkv": {"suffix": 32, "size": kept - 32, "every": every},
        "criticalkv": {"window": 32, "size": kept - 32, "every": every},
        "random": {"window": 32, "size": kept - 32, "every": every},
    }
    return {name: sj.kv.preset(name, **options) for name, options in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--every", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    tokens = np.array([tokenizer.encode("\n".join(topics.values()))[: arguments.tokens]], np.int32)
    rows = []
    for name, cache in {
        "dense": sj.kv.preset("dense", capacity=arguments.tokens),
        **caches(arguments.slots, arguments.every),
    }.items():
        state = sj.init_state(model, cache)
        size = state.cache_bytes
        state, nats = sj.score(model, state, tokens, arguments.chunk)
        began = time.process_time()
        jax.block_until_ready(sj.score(model, sj.init_state(model, cache), tokens, arguments.chunk)[1])
        spent = time.process_time() - began
        mean = float(np.asarray(nats)[0, SKIPPED:].mean(dtype=np.float64))
        slots = max(kept.slots for kept in state.caches)
        rows.append(
            {
                "cache": name,
                "slots": slots,
                "MB": size / 1e6,
                "nats": mean,
                "perplexity": math.exp(mean),
                "tokens/CPU s": tokens.shape[1] / spent,
            }
        )
        print(rows[-1], flush=True)
    report("caches/scored_perplexity", rows, arguments.output, tokens=arguments.tokens, every=arguments.every)


if __name__ == "__main__":
    main()
