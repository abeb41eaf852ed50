"""Perplexity of a real model over caches of one total, divided by budgets, and over caches that merge what they drop.

    python -m benchmarks.caches.budgets_and_merging --model=FOLDER

SmolLM2-135M-Instruct reads the text of Python's own help topics (`pydoc_data.topics`). All caches but `dense` have the
same slots on the mean over layers and heads, those that wait for a choice and the windows in front included; `snapkv`
and `h2o` are what the others build on, with the same windows. `stream` is the nats of a token where the text is one
stream, on average over the tokens behind the first 1,024. `prompt` is that of the last 512 where all before them
are read by `dense` first and then compacted at once, by the last 32. In streams `cake`, `prefix_kv` and the layers of
`d2o` are calibrated on another part of the text; at a prompt they measure it. Their sizes are multiples of a quarter of
the mean, so that layers share their programs; `pyramid_kv` has 3 sizes, and `a size a layer` is the published line.
`MB` are of the stream's state.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

import streamjax as sj
from benchmarks.reporting import report
from streamjax.kv.presets.registry import Built

SKIPPED, PROMPT_END, ASKED = 1024, 512, 32


def caches(slots: int, every: int) -> dict[str, Built]:
    """Every cache of so many slots on the mean."""
    kept = slots - every
    snap: dict[str, int] = {"window": ASKED, "size": kept - ASKED, "every": every}
    heavy = {"window": kept // 2, "size": kept - kept // 2, "every": every}
    sunk = {**heavy, "sinks": 4, "size": kept - kept // 2 - 4}
    named = {"snapkv": snap, "pyramid_kv": snap, "cake": snap, "ada_kv": snap}
    named |= {"prefix_kv": {"sinks": 4, "window": ASKED, "size": kept - ASKED - 4, "every": every}}
    named |= {"h2o": heavy, "kvmerger": heavy, "ems": heavy, "d2o": heavy, "elastic_cache": sunk, "cam": sunk}
    found = {name: sj.kv.preset(name, **options) for name, options in named.items()}
    found["pyramid_kv, a size a layer"] = sj.kv.preset("pyramid_kv", **snap, levels=0)
    found["d2o, layers by density"] = sj.kv.Budgeted(found["d2o"], sj.kv.Density())
    return {
        name: dataclasses.replace(cache, multiple=snap["size"] // 4, distinct=0)
        if isinstance(cache, sj.kv.Budgeted) and not isinstance(cache.budget, sj.kv.Pyramid)
        else cache
        for name, cache in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--every", type=int, default=64)
    parser.add_argument("--caches", nargs="+", help="some of them, by name")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    ids = np.array([tokenizer.encode("\n".join(topics.values()))], np.int32)
    tokens, other = ids[:, : arguments.tokens], ids[:, -SKIPPED:]
    prompt, end = tokens[:, :-PROMPT_END], tokens[:, -PROMPT_END:]
    dense = sj.kv.preset("dense", capacity=arguments.tokens)
    read = sj.read(model, sj.init_state(model, dense), prompt)
    rows, calibrations = [], {}
    for name, cache in {"dense": dense, **caches(arguments.slots, arguments.every)}.items():
        if arguments.caches and name not in arguments.caches:
            continue
        streamed = cache
        if isinstance(cache, sj.kv.Budgeted) and cache.unmeasured:
            by = cache.budget.measured_by
            calibrations[by] = calibrations.get(by) or sj.measure_budget(model, other, cache.budget, queries=256)
            streamed = dataclasses.replace(cache, calibration=calibrations[by])
        state = sj.init_state(model, streamed)
        sizes, size = [kept.slots for kept in state.caches], state.cache_bytes
        nats = np.asarray(sj.score(model, state, tokens)[1])[0, SKIPPED:]
        if name == "dense":
            after = sj.read(model, sj.init_state(model, dense), prompt)
        else:
            after = sj.compact(model, read, cache, prompt[:, -ASKED:])
        last = np.asarray(sj.score(model, after, end)[1])[0]
        rows.append(
            {
                "cache": name,
                "slots": f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else sizes[0],
                "MB": size / 1e6,
                "stream": nats.mean(dtype=np.float64).item(),
                "stream, perplexity": math.exp(nats.mean(dtype=np.float64)),
                "prompt": last.mean(dtype=np.float64).item(),
                "prompt, perplexity": math.exp(last.mean(dtype=np.float64)),
            }
        )
        print(rows[-1], flush=True)
    report("caches/budgets_and_merging", rows, arguments.output, tokens=arguments.tokens, every=arguments.every)


if __name__ == "__main__":
    main()
