"""Beside kvpress: the same weights, prompts and shares of tokens, each side in processes of its own.

    python -m benchmarks.caches.versus_kvpress --model=FOLDER --python=VENV/bin/python
    python -m benchmarks.caches.versus_kvpress ... --parts programs      # compiles what follows, on any machine
    python -m benchmarks.caches.versus_kvpress ... --parts times wall    # then this is short, and wants a quiet one

SmolLM2-135M-Instruct in float32 answers tasks of RULER. A context is read, then compacted to a share of its tokens,
then the question is asked and answered greedily, and nothing more goes: kvpress's form; here `sj.compact` on a dense
cache, which keeps of each task's contexts that share of the shortest. `same` is the share of what kvpress keeps of one
context that is kept here too, over layers and heads. Scores are per cent with standard errors, over the tasks together;
`paired` is ours less kvpress's, example by example. `CPU s` and `s` are one context read, compacted to the first share,
and an answer of 16 tokens: medians after a first run, which compiles. `s` are seconds with all cores, whose `ratio` is
theirs over ours; `CPU s` those of all threads, of which torch has one there: with more, their waiting for each other
would count. The environment of --python has kvpress 0.5.5, transformers 5.2.0 and torch 2.13.0. An interrupted run goes
on from --work, task by task and method by method; the same command with fewer --tasks, the first ones, gives the table
of what they have. `kvpress_rows.json` there is for `infer.leaderboard --beside`.

Not the same rule: `h2o`, `leverage`, `compactor`, `random`, `kvzip`, `criticaladakv`, `think`; docs/leaderboard.md says
how each differs. What is kept of `think` is a share of the keys' channels; of `simlayerkv` that share of the tokens
stays in lazy layers, and all in others. Layers of different lengths (pyramidkv, simlayerkv) read the question token by
token there: transformers makes one mask, of the first layer's length.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import streamjax as sj
from benchmarks.caches.beside_kvpress.methods import LAZY_THRESHOLD, METHODS
from benchmarks.caches.beside_kvpress.ours import (
    CLOCKS,
    asked,
    measured_filters,
    our_choices,
    our_programs,
    our_scores,
    our_times,
)
from benchmarks.reporting import report
from streamjax.checkpoints.plain_json import to_json
from streamjax.commands.shell.runner import keep_compiled
from streamjax.data.recall.chat_frames import chat_frame
from streamjax.data.ruler import make_example, score
from streamjax.evaluation.context_states import Encoded
from streamjax.evaluation.leaderboard_rows import mean_and_error

SIDE = Path(__file__).parent / "beside_kvpress" / "kvpress_side.py"
PARTS = ["choices", "scores", *CLOCKS]
PROGRAMS = "programs"  # all that `times` and `wall` compile here, kept in a folder of --work
SIDES = ("streamjax", "kvpress")
REPEAT = "\n\nRepeat the previous context exactly."  # what kvzip asks, as kvpress has it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--python", required=True, help="the Python of kvpress's environment")
    parser.add_argument("--tasks", nargs="+", default=["niah_single_1", "niah_single_2", "niah_multikey_1", "passkey"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5], help="shares of the tokens that stay")
    parser.add_argument("--answer_tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("out/versus_kvpress"), help="where what is done stands")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--parts", nargs="*", default=PARTS, help="what is done stays; none: the table alone")
    parser.add_argument("--side", choices=[*PARTS, PROGRAMS], help="for the script itself: one half of the work")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - {*PARTS, PROGRAMS}:
        parser.error(f"--parts: {', '.join(sorted(unknown))}: the parts are {', '.join([*PARTS, PROGRAMS])}")
    request = taken_up(arguments, make_request(arguments))
    if arguments.side:
        sides = {
            "scores": our_scores,
            "choices": our_choices,
            **dict.fromkeys(CLOCKS, our_times),
            PROGRAMS: our_programs,
        }
        with keep_compiled(str(arguments.work / "compiled"), seconds=0.1):
            sides[arguments.side](arguments, request)
        return
    path = arguments.work / "request.json"
    for what in arguments.parts:
        ours = [sys.executable, "-m", "benchmarks.caches.versus_kvpress", *sys.argv[1:], f"--side={what}"]
        theirs = [arguments.python, str(SIDE), what, str(path), str(arguments.work / f"kvpress_{what}.json")]
        for command in (ours, theirs)[: 1 if what == PROGRAMS else 2]:
            subprocess.run(command, check=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    give(arguments, request)


def make_request(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that both sides need, in ids."""
    tokenizer = sj.load_tokenizer(arguments.model)
    frame = chat_frame(tokenizer)
    repeat = tokenizer.encode(REPEAT + (frame.answer if frame else "\n"), continues=True)
    examples = []
    for task in arguments.tasks:
        for seed in range(arguments.examples):
            encoded = Encoded.from_example(
                tokenizer, make_example(task, arguments.length, tokenizer, seed, frame), frame
            )
            turn = encoded.example.turns[0]
            examples.append(
                {
                    "task": task,
                    "context": encoded.context,
                    "prompt": encoded.prompts[0],
                    "answers": turn.answers,
                    "answer_tokens": min(turn.answer_tokens, arguments.answer_tokens),
                }
            )
    other = make_example("niah_single_2", arguments.length, tokenizer, -1, frame)
    other_context = Encoded.from_example(tokenizer, other, frame).context
    room = max(len(row["prompt"]) + row["answer_tokens"] for row in examples)
    return {
        "room": max(room, 64),
        "longest": max(len(row["context"]) for row in examples) + room,
        "model": arguments.model,
        "methods": arguments.methods,
        "ratios": arguments.ratios,
        "examples": examples,
        "repeats": arguments.repeats,
        "timed_tokens": 16,
        "repeat": repeat,
        "lazy": LAZY_THRESHOLD,
        "filters": measured_filters(arguments.model, arguments.work, other_context),
    }


def taken_up(arguments: argparse.Namespace, request: dict[str, Any]) -> dict[str, Any]:
    """The request, of which a run in --work may have done a part: its first tasks, or some of its methods.

    Raises:
      SystemExit: a run with other settings.
    """
    request = json.loads(json.dumps(request))
    path = arguments.work / "request.json"
    if path.exists():
        before = json.loads(path.read_text())
        common = min(len(before["examples"]), len(request["examples"]))
        if any(before[key] != request[key] for key in ("ratios", "model")) or (
            before["examples"][:common] != request["examples"][:common]
        ):
            raise SystemExit(f"{arguments.work} holds a run with other settings: name another folder by --work")
        request |= {key: max(before[key], request[key]) for key in ("room", "longest")}
    arguments.work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(request))
    return request


def agreement(ours: list[list[list[int]]], theirs: list[list[list[int]]]) -> float:
    """The share of what kvpress keeps that is kept here too, over layers and heads."""
    pairs = [(set(a), set(b)) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return statistics.fmean(len(a & b) / len(b) for a, b in pairs)


def give(arguments: argparse.Namespace, request: dict[str, Any]) -> None:
    """The table, from what both sides left; "-" for what neither has done yet."""

    def left(what: str) -> dict[str, dict[str, Any]]:
        paths = {side: arguments.work / f"{side}_{what}.json" for side in SIDES}
        return {side: json.loads(path.read_text()) if path.exists() else {} for side, path in paths.items()}

    kept, said, spent, took = map(left, PARTS)

    def scores(side: str, key: str) -> list[float] | None:
        texts = [said[side].get(str(i), {}).get(key) for i in range(len(request["examples"]))]
        if any(text is None for text in texts):
            return None
        return [score(asked(row), text) for row, text in zip(request["examples"], texts, strict=True)]

    def row(name: str, keys: list[str]) -> dict[str, Any]:
        cells: dict[str, Any] = {}
        for key, share in zip(keys, request["ratios"], strict=True):
            ours, theirs = (scores(side, key) for side in SIDES)
            chosen = [kept[side].get(key) for side in SIDES]
            cells[f"same at {share:g}, %"] = 100 * agreement(*chosen) if all(chosen) else "-"
            cells[f"ours at {share:g}"], cells[f"kvpress at {share:g}"] = percent(ours), percent(theirs)
            both = ours is not None and theirs is not None
            paired = [a - b for a, b in zip(ours, theirs, strict=True)] if both else None
            cells[f"paired at {share:g}"] = percent(paired)
        ours, theirs = (took[side].get(name) for side in SIDES)
        return {
            "method": name,
            **cells,
            "our CPU s": spent["streamjax"].get(name, "-"),
            "kvpress CPU s": spent["kvpress"].get(name, "-"),
            "our s": ours or "-",
            "kvpress s": theirs or "-",
            "ratio": theirs / ours if ours and theirs else "-",
        }

    beside = [entry for name in request["methods"] for ratio in request["ratios"]
              if (entry := leaderboard_row(request, said["kvpress"], name, ratio))]  # fmt: skip
    (arguments.work / "kvpress_rows.json").write_text(to_json({"rows": beside}))
    rows = [row("dense", ["dense"] * len(request["ratios"]))]
    rows += [row(name, [f"{name} {ratio}" for ratio in request["ratios"]]) for name in request["methods"]]
    report(
        "caches/versus_kvpress", rows, arguments.output, tasks=arguments.tasks, length=arguments.length,
        examples=arguments.examples, torch="2.13.0", transformers="5.2.0",
        note=f"{', '.join(arguments.tasks)}; {arguments.examples} examples each, {arguments.length:,} tokens.",
    )  # fmt: skip


def percent(scores: list[float] | None) -> str:
    if scores is None:
        return "-"
    mean, error = mean_and_error(scores)
    return f"{100 * mean:.0f} ± {100 * error:.0f}"


def leaderboard_row(
    request: dict[str, Any], said: dict[str, dict[str, str]], name: str, ratio: float
) -> dict[str, Any] | None:
    """kvpress's scores as `infer.leaderboard --beside` reads them; None where they are not all there."""
    scores: dict[str, list[float]] = {}
    for i, example in enumerate(request["examples"]):
        text = said.get(str(i), {}).get(f"{name} {ratio}")
        if text is None:
            return None
        scores.setdefault(example["task"], []).append(score(asked(example), text))
    pairs = {task: mean_and_error(found) for task, found in scores.items()}
    tasks = {task: {"mean": mean, "standard_error": error} for task, (mean, error) in pairs.items()}
    return {"method": name, "budget": ratio, "source": "kvpress 0.5.5", "tasks": tasks}


if __name__ == "__main__":
    main()
