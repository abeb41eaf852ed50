"""From an eighth to half of a dense cache's bytes: what each way to keep less answers, and its perplexity.

    python -m benchmarks.caches.real_model.more_bytes --model=FOLDER         # two hours on 2 quiet cores

The settings and the examples are those of `equal_bytes`, whose table has one eighth; `mean` is that over its five
tasks, in per cent. Rows are sorted by the sum of their means. A cache that keeps every token in fewer bits or numbers
has one size, whatever the budget: it stands in the column of the smallest budget that holds it, with its share of the
bytes in brackets, both for 1,024 tokens. A `-` is a cache that does not fit, or that the run had not come to.

An interrupted run goes on from --work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import streamjax as sj
from benchmarks.caches.real_model.equal_bytes import BUDGET, CACHES, TASKS, mean, settings, with_filters
from benchmarks.reporting import RESULTS, report
from streamjax.evaluation.equal_bytes import total_bytes

FOLDER = RESULTS / "caches" / "real_model"
BUDGETS = (BUDGET, 0.25, 0.5)
LENGTH, ROOM = 1024, 1408  # tokens of a context, and with the question and the answer
IN_FEW_BITS = ("comet", "fireq", "k_sort", "kivi", "kivi:bits=4", "gear", "zipcache", "mikv", "vidkv", "zipvl")


def every_token(room: int) -> dict[str, str]:
    """Caches that keep all of `room` tokens, by their names in the table."""
    in_few_bits = {name: f"{name}{',' if ':' in name else ':'}capacity={room}" for name in IN_FEW_BITS}
    return {
        **in_few_bits,
        "think": f"think:capacity={room}",
        "staircase": f"staircase:window=64,eight=256,four={room - 320}",
        "xkv": f"xkv:room={room}",
        "minicache": f"minicache:room={room}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--cache", action="append", help="a preset with its options; may be repeated")
    parser.add_argument("--work", type=Path, default=Path("out/more_bytes.json"), help="where what is done stands")
    parser.add_argument("--no_run", action="store_true", help="only the table of what is done")
    parser.add_argument("--output", type=Path, default=FOLDER / "more_bytes.json")
    arguments = parser.parse_args()
    if not arguments.no_run:
        run(arguments)
    board = json.loads(arguments.work.read_text())
    found = at_an_eighth()
    for row in board["rows"]:
        if row["budget"] in BUDGETS and all(task in row["tasks"] for task in TASKS):
            found.setdefault(row["method"].partition(":filters=")[0], {})[row["budget"]] = cells(row)
    found |= of_every_token(sj.load(arguments.model, dtype="bfloat16"), {row["method"]: row for row in board["rows"]})
    names = sorted(found, key=lambda name: (name != "dense", -total(found[name])))
    report("caches/real_model/more_bytes", [line(name, found[name]) for name in names], arguments.output)


def run(arguments: argparse.Namespace) -> None:
    common = settings(arguments.model, arguments.work, TASKS, BUDGETS[1:])
    caches = [f"--cache={name}" for name in arguments.cache or [*CACHES, with_filters(arguments)]]
    whole = [] if arguments.cache else [f"--fixed={spec}" for spec in every_token(ROOM).values()]
    subprocess.run([sys.executable, "-m", "infer.leaderboard", *common, *caches, *whole], check=True)


Cells = dict[float, tuple[str, str]]  # by the budget, the mean and the perplexity


def at_an_eighth() -> dict[str, Cells]:
    """The table of `equal_bytes`; a dense cache stands in every column."""
    rows = json.loads((FOLDER / "equal_bytes.json").read_text())["rows"]
    return {
        row["cache"]: dict.fromkeys(
            BUDGETS if row["cache"] == "dense" else BUDGETS[:1], (row["mean"], row["perplexity"])
        )
        for row in rows
    }


def of_every_token(model: sj.Decoder, rows: dict[str, dict[str, Any]]) -> dict[str, Cells]:
    """Those that are done, each in the column of the smallest budget that holds it."""

    def taken(spec: str) -> int:
        name, options = sj.kv.parse_preset(spec)
        return total_bytes(sj.kv.preset(name, **options), model)

    found, dense = {}, taken(f"dense:capacity={LENGTH}")
    for (name, small), spec in zip(every_token(LENGTH).items(), every_token(ROOM).values(), strict=True):
        if spec in rows and all(task in rows[spec]["tasks"] for task in TASKS):
            share = taken(small) / dense
            answered, perplexity = cells(rows[spec])
            if held := [budget for budget in BUDGETS if share <= budget][:1]:
                found[name] = {held[0]: (f"{answered} ({share:.2f})", perplexity)}
    return found


def cells(row: dict[str, Any]) -> tuple[str, str]:
    return f"{100 * mean(row, TASKS):.0f}", f"{row['perplexity']:.2f}"


def total(by_budget: Cells) -> float:
    return sum(float(answered.partition(" ")[0]) for answered, _ in by_budget.values())


def line(name: str, by_budget: Cells) -> dict[str, str]:
    """A row of the table."""
    found = {budget: by_budget.get(budget, ("-", "-")) for budget in BUDGETS}
    means = {f"mean at {budget:g}": answered for budget, (answered, _) in found.items()}
    return {"cache": name, **means, **{f"perplexity at {budget:g}": text for budget, (_, text) in found.items()}}


if __name__ == "__main__":
    main()
