"""Trained retaining heads (Locret) on a real model, beside scores that are not trained, of the same slots.

    python -m benchmarks.caches.real_model.retaining_heads --model=FOLDER --retaining=FILE

SmolLM2-135M-Instruct in float32 reads Python's own help topics (`pydoc_data.topics`) as one stream; `nats` are a
token's on average, behind the first 512. `needles` are examples of RULER's niah_single_1 and niah_single_2, through the
model's chat template in chunks of 64 tokens: what all tokens of the right answer cost together, in nats, on average,
and `said`: examples of which each token of the answer has a probability above one half, so that greedy decoding says
it. Every cache but `dense` has as many slots in each layer. The heads were trained by `python -m train.retaining_heads`
on docstrings of Python's standard library and on questions about facts (`--tasks=both --steps=14 --updates=24
--learning_rate=3e-3 --width=96 --seq_len=512 --answer=96`); `MB` has their matrices too.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

import streamjax as sj
from benchmarks.reporting import RESULTS, report
from streamjax.data.recall.chat_frames import chat_frame
from streamjax.data.ruler import encode_example, make_example
from streamjax.kv.presets.registry import Built
from streamjax.kv.scores.retaining_file import LayerRetainingHeads

TASKS, SEEDS = ("niah_single_1", "niah_single_2"), 2
CHUNK, SKIPPED = 64, 512
NAME = "caches/real_model/retaining_heads"


def caches(slots: int, every: int, capacity: int, retaining: str) -> dict[str, Built]:
    """Every cache of so many slots in all; windows as the presets have them."""
    kept = slots - every
    return {
        "dense": sj.kv.preset("dense", capacity=capacity),
        "h2o": sj.kv.preset("h2o", window=kept // 2, size=kept - kept // 2, every=every),
        "snapkv": sj.kv.preset("snapkv", window=32, size=kept - 32, every=every),
        "locret": sj.kv.preset("locret", retaining=retaining, window=64, size=kept - 64, every=every),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--retaining", required=True, help="what train.retaining_heads has written for it")
    parser.add_argument("--tokens", type=int, default=1280)
    parser.add_argument("--length", type=int, default=512, help="of an example, with room for 128 tokens of answers")
    parser.add_argument("--slots", type=int, default=192)
    parser.add_argument("--every", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.json")
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    tokens = np.array([tokenizer.encode("\n".join(topics.values()))[: arguments.tokens]], np.int32)
    frame, texts, answers = chat_frame(tokenizer), [], []
    for task in TASKS:
        for seed in range(SEEDS):
            example = make_example(task, arguments.length, tokenizer, seed, frame)
            context, prompts = encode_example(tokenizer, example, frame)
            answers.append(tokenizer.encode(" " + example.answers[0], continues=True))
            texts.append([*context, *prompts[0], *answers[-1]])
    about = {"tokens": arguments.tokens, "length": arguments.length, "every": arguments.every}
    about["trained on tokens"] = LayerRetainingHeads.load(arguments.retaining).tokens
    rows = []
    if arguments.output.exists():  # an interrupted run goes on
        found = json.loads(arguments.output.read_text())
        rows = found["rows"] if {key: found.get(key) for key in about} == about else []
    for name, cache in caches(arguments.slots, arguments.every, arguments.tokens, arguments.retaining).items():
        if name in [row["cache"] for row in rows]:
            continue
        state = sj.init_state(model, cache)
        size = state.cache_bytes
        nats = float(np.asarray(sj.score(model, state, tokens, 256)[1])[0, SKIPPED:].mean(dtype=np.float64))
        told = np.asarray(sj.score(model, sj.init_state(model, cache, len(texts)), texts, CHUNK)[1])
        costs = [own[len(t) - len(a) : len(t)] for own, t, a in zip(told, texts, answers, strict=True)]
        rows.append(
            {
                "cache": name,
                "slots": max(kept.slots for kept in state.caches),
                "MB": size / 1e6,
                "nats": nats,
                "perplexity": math.exp(nats),
                "needles": float(np.mean([cost.sum() for cost in costs])),
                "said": f"{sum(cost.max() < math.log(2) for cost in costs)} of {len(costs)}",
            }
        )
        report(NAME, rows, arguments.output, **about)


if __name__ == "__main__":
    main()
