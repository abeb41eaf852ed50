"""Needles under caches that attend to a quarter of the tokens: RULER's scores beside those of dense attention.

    python -m benchmarks.caches.needles --model=FOLDER

SmolLM2-135M-Instruct in float32 reads each task's context as a stream, in chunks of 64 tokens, through its own chat
template, and answers greedily. `attended`: tokens that one token attends to at most, sinks, window, pages and its own
chunk together. `stored`: slots of a layer; pages keep every token, so what they save is reads, not memory. `quest`:
every token chooses its pages by itself, for each key head. `quest, block=64`: 64 neighbours choose together what one of
them wants most. A cell is the mean score in per cent over the examples, of which there are few: compare with `dense`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import streamjax as sj
from benchmarks.reporting import RESULTS, report
from streamjax.data.recall.chat_frames import chat_frame
from streamjax.data.ruler import make_example
from streamjax.evaluation.leaderboard import Encoded, answer
from streamjax.kv.presets.registry import Built

TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1")
SINKS, WINDOW, PAGE, CHUNK = 4, 64, 16, 64
ROOM = 256  # for the question and its answer


def caches(length: int, quarter: int) -> dict[str, tuple[int, Built]]:
    """By name: how many tokens a token attends to, and the cache."""
    kept, capacity = quarter - CHUNK, (length + ROOM) // PAGE * PAGE
    top_k = (kept - SINKS - WINDOW) // PAGE
    pages = {"sinks": SINKS, "window": WINDOW, "page": PAGE, "top_k": top_k, "capacity": capacity}
    attended = SINKS + WINDOW + top_k * PAGE + CHUNK
    return {
        "dense": (length, sj.kv.preset("dense", capacity=length + ROOM)),
        "quest": (attended, sj.kv.preset("quest", **pages)),
        "quest, block=64": (attended, sj.kv.preset("quest", **pages, block=64)),
        "streaming_llm": (quarter, sj.kv.preset("streaming_llm", sinks=SINKS, window=kept - SINKS)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--answer_tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS / "caches" / "needles.json")
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    frame = chat_frame(tokenizer)
    examples = [
        Encoded.of(tokenizer, make_example(task, arguments.length, tokenizer, seed, frame), frame)
        for task in arguments.tasks
        for seed in range(arguments.examples)
    ]
    rows, same = [], {"length": arguments.length, "examples": arguments.examples, "tasks": list(arguments.tasks)}
    if arguments.output.exists():  # an interrupted run goes on
        found = json.loads(arguments.output.read_text())
        rows = found["rows"] if {key: found.get(key) for key in same} == same else []
    for name, (attended, cache) in caches(arguments.length, arguments.length // 4).items():
        if name in [row["cache"] for row in rows]:
            continue
        scores = answer(
            model, tokenizer, cache, examples,
            batch_size=len(examples), chunk_size=CHUNK, answer_tokens=arguments.answer_tokens,
        ).scores  # fmt: skip
        stored = max(kept.slots for kept in sj.init_state(model, cache).caches)
        row = {"cache": name, "attended": f"{attended:,}", "stored": f"{stored:,}"}
        for start, task in enumerate(arguments.tasks):
            of_task = scores[start * arguments.examples : (start + 1) * arguments.examples]
            row[task] = f"{100 * statistics.fmean(of_task):.0f}"
        rows.append({**row, "all": f"{100 * statistics.fmean(scores):.0f}"})
        report("caches/needles", rows, arguments.output, **same)


if __name__ == "__main__":
    main()
