"""The best caches at one eighth of the bytes on more examples, compared example by example.

    python -m benchmarks.caches.real_model.paired_bytes --model=FOLDER                 # 2 cores: an hour
    python -m benchmarks.caches.real_model.paired_bytes --model=FOLDER --cache=kvzip:codec=int4 --cache=snapkv

The settings are those of `equal_bytes`, the examples others: eight of each task for each of `--seeds`. All caches have
the same ones, so what counts is the mean of differences: `minus the first` is what a cache scores more than the first
one, in points of the mean over tasks, each counting alike, with the standard error of that difference. Options of the
first cache were chosen on examples of other seeds (`--seeds 50`, which no row here has).

An interrupted run goes on from --work.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.caches.real_model.equal_bytes import BUDGET, EXAMPLES, TASKS, settings
from benchmarks.reporting import RESULTS, report

CACHES = ("kvzip:codec=int4,floor=0.2", "keydiff:codec=int4", "kvzip:codec=int4", "leverage")
Scores = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--cache", action="append", help="a preset with its options; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="0 are the examples of equal_bytes")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--work", type=Path, default=Path("out/paired_bytes"), help="a folder for what is done")
    parser.add_argument("--no_run", action="store_true", help="only the table of what is done")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    caches = arguments.cache or list(CACHES)
    arguments.work.mkdir(parents=True, exist_ok=True)
    boards = []
    for seed in arguments.seeds:
        file = arguments.work / f"seed_{seed}.json"
        if not arguments.no_run:
            run = [*settings(arguments.model, file, arguments.tasks), f"--seed={seed}", "--text="]
            run += [f"--cache={name}" for name in caches]
            subprocess.run([sys.executable, "-m", "infer.leaderboard", *run], check=True)
        if file.exists():
            boards.append(json.loads(file.read_text()))
    found = {name: joined(boards, name, arguments.tasks) for name in ("dense", *caches)}
    first = found[caches[0]]
    rows = [line(name, scores, None if name in ("dense", caches[0]) else first) for name, scores in found.items()
            if scores]  # fmt: skip
    examples = EXAMPLES * len(boards)
    report("caches/real_model/paired_bytes", rows, arguments.output or RESULTS / "caches" / "real_model" /
           "paired_bytes.json", budget=BUDGET, examples=examples)  # fmt: skip


def joined(boards: list[dict[str, Any]], name: str, tasks: list[str]) -> Scores:
    """All examples' scores, task by task; nothing where a board lacks any."""
    rows = [next((row for row in board["rows"] if row["method"] == name), {"tasks": {}}) for board in boards]
    if not all(task in row["tasks"] for row in rows for task in tasks):
        return {}
    return {task: [score for row in rows for score in row["tasks"][task]["scores"]] for task in tasks}


def line(name: str, scores: Scores, first: Scores | None) -> dict[str, Any]:
    """A row of the table."""
    cells = {task: f"{100 * statistics.fmean(found):.0f}" for task, found in scores.items()}
    mean, error = over_tasks(scores)
    row = {"cache": name, **cells, "mean": f"{100 * mean:.1f} ± {100 * error:.1f}", "minus the first": "-"}
    if first:
        less, error = over_tasks({task: [mine - its for mine, its in zip(found, first[task], strict=True)]
                                  for task, found in scores.items()})  # fmt: skip
        row["minus the first"] = f"{100 * less:+.1f} ± {100 * error:.1f}"
    return row


def over_tasks(numbers: Scores) -> tuple[float, float]:
    """The mean over tasks of their means, and its standard error.

    >>> over_tasks({"a": [1.0, 0.0, 1.0, 0.0], "b": [1.0, 1.0, 1.0, 1.0]})
    (0.75, 0.14433756729740643)
    """
    mean = statistics.fmean(statistics.fmean(found) for found in numbers.values())
    errors = (statistics.variance(found) / len(found) for found in numbers.values())
    return mean, math.sqrt(sum(errors)) / len(numbers)


if __name__ == "__main__":
    main()
