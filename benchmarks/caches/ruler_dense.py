"""What a model can do before anything is taken from it: RULER's tasks by length, with a cache that keeps everything.

    python -m benchmarks.caches.ruler_dense --model=FOLDER

SmolLM2-135M-Instruct in float32, through its own chat template, greedily, as `infer.leaderboard` asks. Each cell is the
mean score in per cent and its standard error over the examples in the last row; answers are cut after 48 tokens. A `-`
is a task that does not fit, or that the run had not come to. Caches are compared where these numbers leave something
to lose.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import streamjax as sj
from benchmarks.reporting import RESULTS, report
from streamjax.data.recall.chat_frames import chat_frame
from streamjax.data.ruler import GROUPS, make_example
from streamjax.evaluation.context_states import ContextReader, Encoded
from streamjax.evaluation.leaderboard import answer
from streamjax.evaluation.leaderboard_rows import mean_and_error

TASKS = [*(task for task in GROUPS["ruler"] if not task.startswith("qa_")), "passkey", "number_string"]
EXAMPLES = {512: 8, 1024: 8, 2048: 6, 4096: 3, 8192: 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(EXAMPLES))
    parser.add_argument("--answer_tokens", type=int, default=48)
    parser.add_argument("--output", type=Path, default=RESULTS / "caches" / "ruler_dense.json")
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    frame, reader = chat_frame(tokenizer), ContextReader(model, tokenizer)
    done: dict[str, Any] = {}
    if arguments.output.exists():  # an interrupted run goes on
        done = json.loads(arguments.output.read_text()).get("scores", {})
    for length in arguments.lengths:
        count = EXAMPLES.get(length, 4)
        cache = sj.kv.preset("dense", capacity=length + 1024)
        for task in TASKS:
            name = f"{task} {length}"
            if name in done:
                continue
            try:
                made = [make_example(task, length, tokenizer, seed, frame) for seed in range(count)]
            except ValueError:
                done[name] = None
                continue
            examples = [Encoded.from_example(tokenizer, example, frame) for example in made]
            limit = {"batch_size": min(count, 6), "answer_tokens": arguments.answer_tokens}
            done[name] = answer(reader, cache, examples, **limit).scores
            print(name, done[name], flush=True)
            write(arguments, done)
    write(arguments, done)


def write(arguments: argparse.Namespace, done: dict[str, Any]) -> None:
    lengths = [n for n in arguments.lengths if any(key.endswith(f" {n}") for key in done)]
    rows = [
        {"task": task, **{f"{length:,} tokens": cell(done.get(f"{task} {length}")) for length in lengths}}
        for task in TASKS
    ]
    rows.append({"task": "examples", **{f"{length:,} tokens": EXAMPLES.get(length, 4) for length in lengths}})
    report("caches/ruler_dense", rows, arguments.output, answer_tokens=arguments.answer_tokens, scores=done)


def cell(scores: list[float] | None) -> str:
    if scores is None:
        return "-"
    mean, error = mean_and_error(scores)
    return f"{100 * mean:.0f} ± {100 * error:.0f}"


if __name__ == "__main__":
    main()
