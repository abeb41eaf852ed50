"""Needles under caches that attend to few tokens: what the right answer costs, beside dense attention.

    python -m benchmarks.caches.needles --model=FOLDER    # 2 idle cores: some 3 minutes

SmolLM2-135M-Instruct in float32 reads an example of each of RULER's tasks as a stream, through its own chat template in
chunks of 64 tokens, then the question and the right answer. A cell is what the answer's tokens cost together, in nats;
with `*` each of them has a probability above one half, so that greedy decoding says it. `behind` is what all tokens
from the 256th to the question cost, on average. `attended`: tokens that one token attends to at most, in a context of
some 830 tokens; sinks, window, pages and its own chunk together. Pages keep every token: what they save is reads, not
memory. Every token chooses its pages by itself, for each key head; with `block=64` neighbours choose together. `first
layers dense`: as Quest's paper has it, two layers read everything.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import streamjax as sj
from benchmarks.reporting import RESULTS, report
from streamjax.data.recall.chat_frames import chat_frame
from streamjax.data.ruler import encode_example, make_example
from streamjax.kv.presets.registry import Built

TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2")
CHUNK, SKIPPED, QUESTION = 64, 256, 40


def caches(capacity: int, layers: int) -> dict[str, tuple[int, Built]]:
    """By name: how many tokens a token attends to, and the cache."""
    topk = sj.kv.preset("topk_attention", window=16, page=8, top_k=22, capacity=capacity)
    quest = {"window": 16, "page": 16, "top_k": 11, "capacity": capacity}
    dense = sj.kv.preset("dense", capacity=capacity)
    few = 4 + 16 + 176 + CHUNK
    return {
        "dense": (capacity, dense),
        "topk_attention": (few, topk),
        "topk_attention, first layers dense": (few, (dense,) * 2 + (topk,) * (layers - 2)),  # type: ignore[dict-item]
        "quest": (few, sj.kv.preset("quest", **quest)),
        "quest, block=64": (few, sj.kv.preset("quest", **quest, block=64)),
        "streaming_llm": (few, sj.kv.preset("streaming_llm", sinks=4, window=few - 4)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--length", type=int, default=960, help="of an example, with room for 128 tokens of answers")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--output", type=Path, default=RESULTS / "caches" / "needles.json")
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    frame = chat_frame(tokenizer)
    texts, answers = [], []
    for seed, task in enumerate(arguments.tasks):
        example = make_example(task, arguments.length, tokenizer, seed, frame)
        context, prompts = encode_example(tokenizer, example, frame)
        answers.append(tokenizer.encode(" " + example.answers[0], continues=True))
        texts.append([*context, *prompts[0], *answers[-1]])
    same = {"length": arguments.length, "tasks": list(arguments.tasks)}
    rows = []
    if arguments.output.exists():  # an interrupted run goes on
        found = json.loads(arguments.output.read_text())
        rows = found["rows"] if {key: found.get(key) for key in same} == same else []
    capacity = -(-arguments.length // 64) * 64
    for name, (attended, cache) in caches(capacity, model.config.num_layers).items():
        if name in [row["cache"] for row in rows]:
            continue
        nats = np.asarray(sj.score(model, sj.init_state(model, cache, len(texts)), texts, CHUNK)[1])
        row = {"cache": name, "attended": "all" if name == "dense" else f"{attended:,}"}
        behind = []
        for task, text, answer, own in zip(arguments.tasks, texts, answers, nats, strict=True):
            end = len(text) - len(answer)
            cost = own[end : len(text)]
            row[task] = f"{cost.sum():.2f}{'*' if cost.max() < np.log(2) else ''}"
            behind.append(own[SKIPPED : end - QUESTION].mean())
        rows.append({**row, "behind": float(np.mean(behind))})
        report("caches/needles", rows, arguments.output, **same)


if __name__ == "__main__":
    main()
