"""Beside kvpress: the same weights, prompts and shares of tokens, each side in processes of its own.

    python -m benchmarks.caches.versus_kvpress --model=FOLDER --python=VENV/bin/python
    python -m benchmarks.caches.versus_kvpress ... --parts programs      # compiles what follows, on any machine
    python -m benchmarks.caches.versus_kvpress ... --parts times wall    # then this is short, and wants a quiet one

SmolLM2-135M-Instruct in float32 answers tasks of RULER. A context is read, then compacted to a share of its tokens,
then the question is asked and answered greedily, and nothing more goes: kvpress's form; here `sj.compact` on a dense
cache. `same tokens` is the share of what kvpress keeps of one context, at the first share, that is kept here too, over
layers and heads. Scores are per cent with standard errors, over the tasks together. `CPU s` and `s` are one context
read, compacted to the first share, and an answer of 16 tokens: medians after a first run, which compiles. `s` are
seconds with all cores, whose `ratio` is theirs over ours; `CPU s` those of all threads, of which torch has one there:
with more, their waiting for each other would count. The environment of --python has kvpress 0.5.5, transformers 5.2.0
and torch 2.13.0. An interrupted run goes on from --work, task by task and method by method; the same command with fewer
--tasks, the first ones, gives the table of what they have.
`kvpress_rows.json` there is for `infer.leaderboard --beside`.

Not the same rule: `h2o` is the paper's here, sums of attention and a recent half, where kvpress's ObservedAttention
takes the mean over the queries that see a token and keeps no recent ones. `leverage` is exact here, with the first and
newest tokens kept; there keys are sketched. `random` draws other numbers. docs/leaderboard.md has the others. PyramidKV
has no answers there: its layers differ in length, and transformers makes one mask of the first one's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import report
from streamjax.checkpoints.plain_json import to_json
from streamjax.commands.shell.runner import keep_compiled
from streamjax.data.recall.chat_frames import chat_frame
from streamjax.data.ruler import Turn, make_example, score
from streamjax.evaluation.context_states import Encoded, compacted, wholly
from streamjax.evaluation.leaderboard_rows import mean_and_error
from streamjax.kv.presets.registry import Built
from streamjax.kv.tiers.sink import TRUE_DISTANCE
from streamjax.streaming.by_layer.writing import write_layerwise

SIDE = Path(__file__).parent / "kvpress_side.py"
FIRST = sj.kv.Sink(4, reach=TRUE_DISTANCE)
# (tokens that are kept, tokens of question and answer) -> a cache that keeps so many until the answer is there
METHODS: dict[str, Callable[[int, int], Built]] = {
    "streaming_llm": lambda kept, room: sj.kv.Cascade(FIRST, sj.kv.Window(kept - 4)),
    "snapkv": lambda kept, room: sj.kv.preset("snapkv", window=32, size=kept - 32, kernel=5, every=room),
    "h2o": lambda kept, room: sj.kv.preset("h2o", window=kept // 2, size=kept - kept // 2, every=room),
    "tova": lambda kept, room: sj.kv.preset("tova", size=kept, every=room),
    "knorm": lambda kept, room: sj.kv.preset("knorm", size=kept, every=room),
    "keydiff": lambda kept, room: sj.kv.preset("keydiff", size=kept, every=room),
    "lagkv": lambda kept, room: sj.kv.preset("lagkv", sinks=4, size=kept - 4, lag=128),
    "expected_attention": lambda kept, room: sj.kv.preset("expected_attention", sinks=4, size=kept - 4, every=room),
    "chunkkv": lambda kept, room: sj.kv.preset("chunkkv", window=30, size=kept - 30, every=-(-room // 10) * 10),
    "curdkv": lambda kept, room: sj.kv.preset("curdkv", sinks=4, size=kept - 4, every=room),
    "leverage": lambda kept, room: sj.kv.preset("leverage", sinks=8, window=4, size=kept - 12, every=room),
    "pyramidkv": lambda kept, room: sj.kv.preset("pyramid_kv", window=32, size=kept - 32, kernel=5, every=room),
    "adakv": lambda kept, room: sj.kv.preset("ada_kv", window=32, size=kept - 32, kernel=5, every=room),
    "criticalkv": lambda kept, room: sj.kv.preset("criticalkv", window=32, size=kept - 32, kernel=5, every=room),
    "random": lambda kept, room: sj.kv.Cascade(sj.kv.Scored(kept, sj.kv.RandomChoice(1), every=room)),
}
CLOCKS = {"times": time.process_time, "wall": time.perf_counter}
PARTS = ["choices", "scores", *CLOCKS]
PROGRAMS = "programs"  # all that `times` and `wall` compile here, kept in a folder of --work
SIDES = ("streamjax", "kvpress")
GREEDY = sj.Sampler(temperature=0)


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
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=[*PARTS, PROGRAMS], help="what is done stays")
    parser.add_argument("--side", choices=[*PARTS, PROGRAMS], help="for the script itself: one half of the work")
    arguments = parser.parse_args()
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
    room = max(len(row["prompt"]) + row["answer_tokens"] for row in examples)
    return {
        "room": max(room, 64),
        "shortest": min(len(row["context"]) for row in examples),  # one size for all, so that there is one program
        "longest": max(len(row["context"]) for row in examples) + room,
        "model": arguments.model,
        "methods": arguments.methods,
        "ratios": arguments.ratios,
        "examples": examples,
        "repeats": arguments.repeats,
        "timed_tokens": 16,
    }


def taken_up(arguments: argparse.Namespace, request: dict[str, Any]) -> dict[str, Any]:
    """The request, of which a run in --work may have done a part: its first tasks, or some of its methods.

    Sizes of caches are those of the run's first request, so that what is done stands beside what joins it.

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
        request["shortest"] = before["shortest"]
        request |= {key: max(before[key], request[key]) for key in ("room", "longest")}
    arguments.work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(request))
    return request


def our_cache(request: dict[str, Any], name: str, ratio: float) -> Built:
    return METHODS[name](int(request["shortest"] * ratio), request["room"])


def laid_out(
    model: sj.Decoder, tokenizer: Any, state: Any, cache: Built, rows: list[dict[str, Any]], longest: int
) -> Any:
    """The state after compaction; what has a window goes on where nothing is pushed out."""
    contexts, prompts = [row["context"] for row in rows], [row["prompt"] for row in rows]
    state = compacted(model, tokenizer, state, cache, contexts, prompts)
    if isinstance(cache, sj.kv.Cascade) and not any(isinstance(tier, sj.kv.Scored) for tier in cache.tiers):
        state = sj.compact(model, state, sj.kv.preset("dense", capacity=longest))
    return state


def our_scores(arguments: argparse.Namespace, request: dict[str, Any]) -> None:
    path = arguments.work / "streamjax_scores.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    jobs = [("dense", 1.0), *((name, ratio) for name in request["methods"] for ratio in request["ratios"])]
    for task in arguments.tasks:
        numbers = [i for i, row in enumerate(request["examples"]) if row["task"] == task]
        rows = [request["examples"][i] for i in numbers]
        longest = request["longest"]
        read: dict[Any, Any] = {}  # states behind the contexts, by the cache that keeps everything
        for name, ratio in jobs:
            key = name if name == "dense" else f"{name} {ratio}"
            if all(key in done.get(str(i), {}) for i in numbers):
                continue
            cache = sj.kv.preset("dense", capacity=longest) if name == "dense" else our_cache(request, name, ratio)
            whole = wholly(cache, longest, 512)
            if whole not in read:
                contexts = [row["context"] for row in rows]
                read[whole] = sj.read(model, sj.init_state(model, whole, len(rows)), contexts)
            if name == "dense":
                state = jax.tree.map(jnp.copy, read[whole])  # compact leaves what it is given, generate does not
            else:
                state = laid_out(model, tokenizer, read[whole], cache, rows, longest)
            tokens = max(row["answer_tokens"] for row in rows)
            prompts = [row["prompt"] for row in rows]
            # token by token and layer by layer: layers of equal sizes share one program, where `generate` has all of
            # them in one for each method and share
            options = {"max_new_tokens": tokens, "stop_tokens": tokenizer.eos_ids, "enough": right(tokenizer, rows)}
            _, said = write_layerwise(model, state, prompts, **options)
            for i, ids in zip(numbers, said, strict=True):
                done.setdefault(str(i), {})[key] = plain(tokenizer, ids)
            path.write_text(json.dumps(done))
            print(task, key, file=sys.stderr, flush=True)


def plain(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode([token for token in ids if token not in tokenizer.eos_ids])


def right(tokenizer: Any, rows: list[dict[str, Any]]) -> Callable[[int, list[int]], bool]:
    """Whether a row's text has all the answers, so that nothing behind it counts."""
    return lambda row, ids: score(asked(rows[row]), plain(tokenizer, ids)) == 1.0


def asked(row: dict[str, Any]) -> Turn:
    return Turn("", "", tuple(row["answers"]), row["answer_tokens"])


def our_choices(arguments: argparse.Namespace, request: dict[str, Any]) -> None:
    """Which places of the first context stay, by layer and head, at the first share."""
    path = arguments.work / "streamjax_choices.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    row = request["examples"][0]
    states: dict[Any, Any] = {}
    for name in request["methods"]:
        if name in found:
            continue
        cache = METHODS[name](int(len(row["context"]) * request["ratios"][0]), request["room"])
        whole = wholly(cache, request["longest"], 512)
        if whole not in states:
            states[whole] = sj.read(model, sj.init_state(model, whole), [row["context"]])
        state = compacted(model, tokenizer, states[whole], cache, [row["context"]], [row["prompt"]])
        heads = [block.mixer.num_kv_heads for block in model.config.blocks]
        layers = zip(state.caches, state.layers, heads, strict=True)
        try:
            found[name] = [places(kept, part, count) for kept, part, count in layers]
        except ValueError:  # heads of one pool hold different numbers of tokens, which cannot be taken out
            found[name] = None
        path.write_text(json.dumps(found))
        print(name, file=sys.stderr, flush=True)


def places(cache: Any, layer: Any, heads: int) -> list[list[int]]:
    """What the tiers of a layer hold, by head."""
    held: list[list[int]] = [[] for _ in range(heads)]
    for tier, part in zip(cache.tiers, layer, strict=True):
        stored = tier.stored(part, None)
        for head, kept in enumerate(held):
            one = [np.asarray(x)[0] for x in (stored.position, stored.valid)]
            position, valid = (x[head if len(x) > 1 else 0] for x in one)
            kept += position[valid].tolist()
    return [sorted(kept) for kept in held]


def agreement(ours: list[list[list[int]]], theirs: list[list[list[int]]]) -> float:
    """The share of what kvpress keeps that is kept here too, over layers and heads."""
    pairs = [(set(a), set(b)) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return statistics.fmean(len(a & b) / len(b) for a, b in pairs)


def our_programs(arguments: argparse.Namespace, request: dict[str, Any]) -> None:
    """Every method once, so that its programs are in the folder of compiled ones; no time is noted."""
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    for name in request["methods"]:
        print(name, one_turn(model, tokenizer, request, name, time.process_time), file=sys.stderr, flush=True)


def one_turn(
    model: sj.Decoder, tokenizer: Any, request: dict[str, Any], name: str, clock: Callable[[], float]
) -> float:
    """Seconds of a context that is read, compacted and answered about."""
    cache, row = our_cache(request, name, request["ratios"][0]), request["examples"][0]
    longest = request["longest"] + request["timed_tokens"]
    length = len(row["context"])
    even = -(-length // -(-length // 512))  # chunks of one width, at most 512, that leave little to pad
    chunk = -(-even // 16) * 16
    began = clock()
    state = sj.read(model, sj.init_state(model, wholly(cache, longest, chunk)), [row["context"]], chunk)
    state = laid_out(model, tokenizer, state, cache, [row], longest)
    _, said = sj.generate(model, state, [row["prompt"]], max_new_tokens=request["timed_tokens"], sampler=GREEDY)
    jax.block_until_ready(said)
    return clock() - began


def our_times(arguments: argparse.Namespace, request: dict[str, Any]) -> None:
    path = arguments.work / f"streamjax_{arguments.side}.json"
    clock = CLOCKS[arguments.side]
    done = json.loads(path.read_text()) if path.exists() else {}
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    for name in request["methods"]:
        if name in done:
            continue
        spent = [one_turn(model, tokenizer, request, name, clock) for _ in range(request["repeats"] + 1)]
        done[name] = statistics.median(spent[1:])
        path.write_text(json.dumps(done))
        print(name, done[name], file=sys.stderr, flush=True)


def give(arguments: argparse.Namespace, request: dict[str, Any]) -> None:
    """The table, from what both sides left; "-" for what neither has done yet."""

    def left(what: str) -> dict[str, dict[str, Any]]:
        paths = {side: arguments.work / f"{side}_{what}.json" for side in SIDES}
        return {side: json.loads(path.read_text()) if path.exists() else {} for side, path in paths.items()}

    kept, said, spent, took = map(left, PARTS)

    def cell(side: str, key: str) -> str:
        texts = [said[side].get(str(i), {}).get(key) for i in range(len(request["examples"]))]
        pairs = zip(request["examples"], texts, strict=True)
        scores = [score(asked(row), text) for row, text in pairs if text is not None]
        if len(scores) < len(texts):
            return "-"
        mean, error = mean_and_error(scores)
        return f"{100 * mean:.0f} ± {100 * error:.0f}"

    def row(name: str, keys: list[str]) -> dict[str, Any]:
        cells = {f"{'ours' if side == 'streamjax' else side} at {share:g}": cell(side, key)
                 for key, share in zip(keys, request["ratios"], strict=True) for side in SIDES}  # fmt: skip
        ours, theirs = (took[side].get(name) for side in SIDES)
        chosen = [kept[side].get(name) for side in SIDES]
        return {
            "method": name,
            "same tokens, %": 100 * agreement(*chosen) if all(chosen) else "-",
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
