"""Every way to keep less, at one eighth of a dense cache's bytes, on tasks of long contexts.

    python -m benchmarks.caches.real_model.equal_bytes --model=FOLDER                # two hours on 2 quiet cores
    python -m benchmarks.caches.real_model.equal_bytes --model=FOLDER --cache=snapkv --cache=mine:codec=int4
    python -m benchmarks.caches.real_model.equal_bytes --model=FOLDER --beside=out/versus_kvpress/kvpress_rows.json

It is `python -m infer.leaderboard --moment=prompt` with the settings of this table: SmolLM2-135M-Instruct in bfloat16
reads a context of about 1,024 tokens, `sj.compact` lays it out anew when the question comes, and the answer is greedy.
All caches take as many bytes, notes and scales included, so one with `codec=int4` keeps more tokens than one without.
Scores are per cent of eight examples with standard errors; `mean` counts each task alike. `perplexity` is of 256 tokens
behind 1,024 others. Rows are sorted by the mean, then by perplexity.

`kvpress` beside a method is kvpress 0.5.5 on the same weights in float32, at one eighth of the tokens and on the same
examples (`benchmarks.caches.versus_kvpress`), the mean over the tasks that both have done; `ours` is ours there.
An interrupted run goes on from --work. Rows that --work lacks stay in the table as --output has them: the examples and
the settings are always the same.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamjax as sj
from benchmarks.reporting import RESULTS, report

TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "passkey", "number_string")
BUDGET, EXAMPLES = 0.125, 8
COMBINED = ("finch", "keydiff", "kvzip", "snapkv", "ada_kv", "leverage", "streaming_llm")
SINGLE = (
    "streaming_llm", "snapkv", "ada_kv", "pyramid_kv", "finch", "kvzip", "keydiff", "knorm", "tova", "h2o", "lagkv",
    "expected_attention:covariance=false", "chunkkv", "curdkv", "leverage", "criticalkv", "windowkv", "scissorhands",
    "cake", "prefix_kv", "d2o", "kvmerger", "ems", "elastic_cache", "cam", "random",
)  # fmt: skip
CACHES = ("kvzip:codec=int4,floor=0.2", *(f"{name}:codec=int4" for name in COMBINED), *SINGLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--cache", action="append", help="a preset with its options; may be repeated")
    parser.add_argument("--beside", type=Path, help="rows of kvpress")
    parser.add_argument("--work", type=Path, default=Path("out/equal_bytes.json"), help="where what is done stands")
    parser.add_argument("--no_run", action="store_true", help="only the table of what is done")
    parser.add_argument("--output", type=Path, default=RESULTS / "caches" / "real_model" / "equal_bytes.json")
    arguments = parser.parse_args()
    if not arguments.no_run:
        caches = [f"--cache={name}" for name in arguments.cache or [*CACHES, with_filters(arguments)]]
        run = [*settings(arguments.model, arguments.work, TASKS), *caches]
        subprocess.run([sys.executable, "-m", "infer.leaderboard", *run], check=True)
    board = json.loads(arguments.work.read_text())
    beside = json.loads(arguments.beside.read_text())["rows"] if arguments.beside else []
    theirs = {row["method"]: row for row in beside if row["budget"] == BUDGET}
    done = [row for row in board["rows"] if all(task in row["tasks"] for task in TASKS)]
    rows = [line(row, theirs.get(row["method"].replace("_kv", "kv"))) for row in done]
    kept = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    rows += [row for row in kept if row["cache"] not in {new["cache"] for new in rows}]
    versions = {"torch": "2.13.0", "transformers": "5.2.0"} if theirs else {}
    report("caches/real_model/equal_bytes", sorted(rows, key=rank), arguments.output, **versions)


def settings(model: str, work: Path, tasks: Sequence[str], budgets: Sequence[float] = (BUDGET,)) -> list[str]:
    """What every run of the leaderboard for this table is given."""
    return [f"--model={model}", "--dtype=bfloat16", "--moment=prompt", "--length=1K", f"--samples={EXAMPLES}",
            "--answer_tokens=16", f"--tasks={','.join(tasks)}", f"--json={work}", "--png=",
            f"--budget={','.join(map(str, budgets))}"]  # fmt: skip


def with_filters(arguments: argparse.Namespace) -> str:
    """Q-Filters as published: with filters of a text, which is none of the tasks' (Python's help topics are theirs)."""
    file = arguments.work.with_suffix(".filters.safetensors")
    if not file.exists():
        model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
        ids = tokenizer.encode("\n".join(inspect.getsource(module) for module in (argparse, inspect)))
        file.parent.mkdir(parents=True, exist_ok=True)
        sj.measure_filters(model, [ids[:2048]]).save(file)
    return f"qfilters:filters={file}"


def rank(row: dict[str, Any]) -> tuple[bool, float, float]:
    """The dense cache first, then the best, as the table's cells have it."""
    return row["cache"] != "dense", -float(row["mean"]), float(row["perplexity"].replace("-", "0"))


def mean(row: dict[str, Any], tasks: tuple[str, ...]) -> float:
    return statistics.fmean(row["tasks"][task]["mean"] for task in tasks)


def line(row: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
    """A row of the table."""
    cells = {task: f"{100 * (found := row['tasks'][task])['mean']:.0f} ± {100 * (found['standard_error'] or 0):.0f}"
             for task in TASKS}  # fmt: skip
    both = tuple(task for task in TASKS if theirs is not None and task in theirs["tasks"])
    beside = f"{100 * mean(row, both):.0f} : {100 * mean(theirs, both):.0f}" if theirs is not None and both else "-"
    return {
        "cache": row["method"].partition(":filters=")[0],
        "bytes": "1" if row["budget"] in (None, 1.0) else f"{row['budget']:g}",
        **cells,
        "mean": f"{100 * mean(row, TASKS):.0f}",
        "perplexity": f"{row['perplexity']:.2f}" if "perplexity" in row else "-",
        "ours : kvpress": beside,
    }


if __name__ == "__main__":
    main()
