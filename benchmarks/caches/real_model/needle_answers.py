"""Answers to RULER's eight needle tasks where every token attends to a quarter of the others, beside dense attention.

    python -m benchmarks.caches.real_model.needle_answers --model=FOLDER            # half an hour on 2 quiet cores

It is `python -m infer.leaderboard --tasks=needles` with these caches: SmolLM2-135M-Instruct in float32 reads contexts
of 2,048 tokens as a stream, in chunks of 64, and answers greedily. `attended` are the tokens that one attends to at
most: sinks, window, pages and its own chunk together, 512 of 2,048. Pages keep every token: what they save is reads,
not memory; `topk_attention` by itself has pages of one token. `streaming_llm` keeps its 512 tokens and nothing else.

A cell is the mean score in per cent: the share of a question's answers that are in the text. `answered` is the sum over
all tasks over dense attention's; `as dense` counts the examples whose score is at least the dense one's. Scores are
counts over the examples that the last line names, so a task at which dense attention itself fails says nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.reporting import RESULTS, report
from streamjax.data.ruler import GROUPS

NAME = "caches/real_model/needle_answers"
LENGTH, CHUNK, QUARTER = 2048, 64, 512
PAGED = QUARTER - CHUNK - 4 - 16  # tokens in pages, beside sinks, window and the chunk
CACHES = {
    "topk_attention": f"topk_attention:window=16,page=1,top_k={PAGED},capacity={LENGTH + 512}",
    "topk_attention, page=8": f"topk_attention:window=16,page=8,top_k={PAGED // 8},capacity={LENGTH + 512}",
    "quest": f"quest:window=16,page=16,top_k={PAGED // 16},capacity={LENGTH + 512}",
    "streaming_llm": f"streaming_llm:sinks=4,window={QUARTER - 4}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--cache", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--work", type=Path, default=Path("out/needle_answers.json"), help="where what is done stands")
    arguments = parser.parse_args()
    run = [f"--model={arguments.model}", "--tasks=needles", f"--length={LENGTH}", f"--samples={arguments.samples}",
           f"--chunk_size={CHUNK}", "--answer_tokens=64", "--text=", "--png=", f"--json={arguments.work}"]  # fmt: skip
    run += [f"--fixed={CACHES[name]}" for name in arguments.cache]
    subprocess.run([sys.executable, "-m", "infer.leaderboard", *run], check=True)
    rows = {row["method"]: row["tasks"] for row in json.loads(arguments.work.read_text())["rows"]}
    lines = [line(name, rows[CACHES.get(name, name)], rows["dense"]) for name in ("dense", *arguments.cache)]
    note = f"{arguments.samples} examples of each task."
    report(NAME, lines, RESULTS / f"{NAME}.json", examples=arguments.samples, note=note)


def line(name: str, tasks: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    scores = {task: tasks[task]["scores"] for task in GROUPS["needles"]}
    theirs = {task: dense[task]["scores"] for task in scores}
    pairs = [pair for task in scores for pair in zip(scores[task], theirs[task], strict=True)]
    return {
        "cache": name,
        "attended": "all" if name == "dense" else f"{QUARTER}",
        **{task.removeprefix("niah_"): f"{100 * statistics.fmean(own):.0f}" for task, own in scores.items()},
        "answered": f"{sum(own for own, _ in pairs) / sum(other for _, other in pairs):.3f}",
        "as dense": f"{sum(own >= other for own, other in pairs)} of {len(pairs)}",
    }


if __name__ == "__main__":
    main()
