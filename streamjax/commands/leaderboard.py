"""Which cache keeps what matters? Caches of equal bytes on tasks of long contexts: scores, perplexity, speed, memory.

    python -m infer.leaderboard --model=SmolLM2-135M-Instruct --tasks=ruler --length=4096 --budget=0.125,0.25,0.5
    python -m infer.leaderboard --model=FOLDER --tasks=niah_single_1,vt --length=2K --samples=20 --moment=prompt \\
        --cache=snapkv --cache=h2o:every=32 --fixed=quest:capacity=4096,top_k=32
    python -m infer.leaderboard --model=FOLDER --length=4K --beside=kvpress.json

Each --cache is made as large as each --budget allows, in bytes: a share of what a dense cache of --length tokens takes,
counting everything in the state, what a method notes beside keys and values too. A cache that keeps everything comes
first, and --fixed are caches as they are, whatever their bytes; with --fixed alone no other caches are sized.

--moment=stream lets a cache hold the stream from its first token on. --moment=prompt reads the context into a dense
cache and compacts that when the question comes, as the papers of many methods and kvpress do; the question's and the
answer's tokens are beside the budget there, and none of them has to go.

Tasks by name or group: ruler (RULER's thirteen; qa_1 and qa_2 need --documents and are left out without), needles,
scbench, infinitebench, mrcr. Scores are the benchmarks' own, mostly the share of the answers that a text contains.

The numbers go into --json after every task of every cache, so Ctrl-C loses nothing: the same command goes on where it
was. --beside puts rows of other files of this form into the table and the picture; of a row it reads "method",
"budget", "source", "state_bytes", "perplexity", and "tasks": {"vt": {"mean": 0.9, "standard_error": 0.05}}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

import streamjax as sj
from streamjax.checkpoints import user_path
from streamjax.checkpoints.json_files import read_json
from streamjax.commands.comparison import read_text
from streamjax.commands.flags.cache import CACHE_HELP
from streamjax.commands.flags.model import define_model, load_model
from streamjax.commands.recall import parse_length
from streamjax.commands.shell.input_files import BUILTIN
from streamjax.commands.shell.outputs import check_outputs, write_json
from streamjax.commands.shell.progress import progress_bar
from streamjax.commands.shell.runner import give, run_command
from streamjax.data.recall.chat_frames import ChatFrame, chat_frame
from streamjax.data.ruler import make_example, task_names
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.evaluation.cache_sizes import describe
from streamjax.evaluation.context_states import MOMENTS, ContextReader, Encoded
from streamjax.evaluation.equal_bytes import BelowSmallest, sized, total_bytes
from streamjax.evaluation.leaderboard import answer, perplexity_behind
from streamjax.evaluation.leaderboard_rows import mean_and_error, read_rows, summarise, table
from streamjax.kv.description import describe_cache
from streamjax.kv.presets.registry import Built, parse_preset, preset, presets
from streamjax.training.run.signals import StopSignals

_CACHES = ["streaming_llm", "snapkv", "h2o", "tova", "knorm", "keydiff", "lagkv", "expected_attention", "random"]
_SETTINGS = ("model", "length", "samples", "seed", "moment", "chat", "answer_tokens", "text")
_SCORED = 256  # tokens behind the length of a text that tell the perplexity, or a quarter of the length


def define(values: flags.FlagValues) -> None:
    define_model(values)
    flags.DEFINE_list("tasks", ["ruler"], "Tasks or groups of tasks.", flag_values=values)
    flags.DEFINE_string("length", "4096", "Tokens of an example, question and answer included; K is 1,024.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_integer("samples", 8, "Examples of each task.", lower_bound=1, flag_values=values)
    flags.DEFINE_multi_string("cache", _CACHES, "Sized by each budget; may be repeated. NAME or "
                              "NAME:OPTION=VALUE,OPTION=VALUE, without the options that make it larger.",
                              flag_values=values)  # fmt: skip
    flags.DEFINE_list("budget", ["0.125", "0.25", "0.5"], "Shares of a dense cache's bytes.", flag_values=values)
    flags.DEFINE_multi_string("fixed", [], f"Caches as they are; may be repeated. {CACHE_HELP}", flag_values=values)
    flags.DEFINE_enum("moment", "stream", MOMENTS, "When a cache begins: with the stream, or at the prompt's end.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_bool("chat", True, "Ask through the model's own chat template, if it has one.", flag_values=values)
    flags.DEFINE_string("documents", None, "Folder with squad.json and hotpotqa.json, for qa_1 and qa_2.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_string("text", BUILTIN, "A text file for perplexity; builtin is held-out text that comes with Python, "
                        "empty is none.", flag_values=values)  # fmt: skip
    flags.DEFINE_integer("answer_tokens", None, "No answer is longer, whatever its task allows.", lower_bound=1,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_integer("batch_size", 8, "Contexts side by side.", lower_bound=1, flag_values=values)
    flags.DEFINE_float("keep_gb", 4.0, "Of contexts that were read, kept for the next cache, with --moment=prompt.",
                       lower_bound=0, flag_values=values)  # fmt: skip
    flags.DEFINE_integer("seed", 0, "Of the examples.", lower_bound=0, flag_values=values)
    flags.DEFINE_multi_string("beside", [], "Files of results to put beside these; may be repeated.",
                              flag_values=values)  # fmt: skip
    flags.DEFINE_string("json", "out/leaderboard.json", "Where the numbers go, and are taken up again.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_string("png", "out/leaderboard.png", "Where the picture goes; empty for nowhere.", flag_values=values)


def body(values: flags.FlagValues) -> None:
    check_outputs(json=values.json, png=values.png)
    length, budgets, names = parse_length(values.length), parse_budgets(values.budget), task_names(values.tasks)
    specs = [] if values.fixed and values["cache"].using_default_value else values.cache
    for spec in (*specs, *values.fixed):  # a wrong name is told before the work
        parse_preset(spec)
    beside = [row for name in values.beside for row in read_rows(name)]
    settings = {name: values[name].value for name in _SETTINGS} | {"length": length}
    board = take_up(values.json, settings)
    model, tokenizer = load_model(values, ())
    frame = chat_frame(tokenizer) if values.chat else None
    tasks, left_out = make_tasks(names, length, values.samples, values.seed, tokenizer, frame, values.documents)
    if not tasks:
        raise ValueError(f"--tasks={','.join(values.tasks)}: nothing is left; {next(iter(left_out.values()))}")
    scored = min(_SCORED, length // 4) if values.text else 0
    room = max([scored, *(encoded.room for examples in tasks.values() for encoded in examples)])
    caches, refused = make_caches(model, specs, values.fixed, budgets, length, room, values.moment)
    board["left_out"] = {**left_out, **refused}
    text = read_text(values.text, tokenizer, 4 * (length + scored))[0] if values.text else []
    with StopSignals() as signals:
        run(values, model, tokenizer, board, tasks, caches, text, signals)
    asked = [row for row in board["rows"] if row["label"] in {label for label, *_ in caches}]
    rows = [*asked, *beside]

    def report() -> None:
        print(f"{Path(values.model).name}, {length:,} tokens, {values.samples} examples a task: % of answers")
        print(table(rows, [task for task in names if task in tasks]))
        for what, why in board["left_out"].items():
            print(f"left out: {what}: {why}")

    def draw() -> None:
        from streamjax.evaluation.leaderboard_plot import plot_leaderboard  # matplotlib takes its time

        title = f"{Path(values.model).name}, {length:,} tokens, {', '.join(tasks)}"
        plot_leaderboard(rows, user_path(values.png), title=title)

    write = [("numbers", values.json, lambda: write_json(values.json, board)), ("picture", values.png, draw)]
    give(report, write, signals.received or 0)


def parse_budgets(texts: Sequence[str]) -> list[float]:
    """Shares of a dense cache's bytes.

    Raises:
      ValueError: what is no number above 0, up to 1.
    """
    budgets = []
    for text in texts:
        try:
            budget = float(text)
        except ValueError:
            budget = -1.0
        if not 0 < budget <= 1:
            raise ValueError(f"--budget: {text!r} is no share of a dense cache: write numbers above 0, up to 1")
        budgets.append(budget)
    return list(dict.fromkeys(budgets))


def take_up(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds of a run with these settings; an empty board where there is none.

    Raises:
      ValueError: it holds something else.
    """
    path = user_path(name)
    if not name or not path.exists() or not path.stat().st_size:
        return {**settings, "left_out": {}, "rows": []}
    board = read_json(path)
    if not isinstance(board.get("rows"), list):
        raise ValueError(f"--json={name} is there, and holds no leaderboard: name another file")
    for key, value in settings.items():
        if board.get(key) != value:
            raise ValueError(
                f"--json={name} holds a run with {key}={board.get(key)}, and this one has {key}={value}: name another "
                "file, or remove it"
            )
    return board


def make_tasks(
    names: Sequence[str], length: int, samples: int, seed: int, tokenizer: Tokenizer, frame: ChatFrame | None,
    documents: str | None,
) -> tuple[dict[str, list[Encoded]], dict[str, str]]:  # fmt: skip
    """Examples of each task, and which tasks cannot be made, and why."""
    tasks: dict[str, list[Encoded]] = {}
    left_out = {}
    for task in names:
        try:
            tasks[task] = [
                Encoded.from_example(
                    tokenizer, make_example(task, length, tokenizer, seed * samples + i, frame, documents), frame
                )
                for i in range(samples)
            ]
        except ValueError as error:
            if documents is not None and task.startswith("qa_"):
                raise
            left_out[task] = str(error)
    return tasks, left_out


Labelled = tuple[str, str, float | None, Built]  # label, method, budget, cache


def make_caches(
    model: sj.Decoder, specs: Sequence[str], fixed: Sequence[str], budgets: Sequence[float], length: int, room: int,
    moment: str,
) -> tuple[list[Labelled], dict[str, str]]:  # fmt: skip
    """A dense cache, each cache by each budget, and those that are as they are; and what there is none of, and why.

    Raises:
      ValueError: a budget that is below the smallest of all these caches.
    """
    caches: list[Labelled] = [("dense", "dense", 1.0, preset("dense", capacity=length + room))]
    dense = describe(preset("dense", capacity=length), model).total
    refused = {}
    least: dict[float, dict[str, float]] = {budget: {} for budget in budgets}  # where one is too small: what would do
    for spec in dict.fromkeys(specs):
        name, options = parse_preset(spec)
        if name == "dense":  # it is there already
            continue
        usual = presets()[name].options.get("every")
        answers = moment == "prompt" and "every" not in options
        if answers and usual:
            options["every"] = -(-room // usual) * usual  # the answer is there before anything has to go
        for budget in budgets:
            label = f"{spec} {budget:g}"
            try:
                free = _waiting_bytes(name, options, model) if answers and usual else 0
                cache = sized(name, model, budget * dense + free, **options)
                if moment == "stream":
                    describe(cache, model)  # a budget that has not measured the model is for prompts alone
                caches.append((label, spec, budget, cache))
            except BelowSmallest as error:
                refused[label] = str(error)
                least[budget][spec] = max(error.smallest - free, 0) / dense
            except ValueError as error:
                refused[label] = str(error)
    for budget, shares in least.items():
        if shares and budget not in [given for _, name, given, _ in caches if name != "dense"]:
            spec = min(shares, key=shares.__getitem__)
            enough = math.ceil(shares[spec] * 1e4) / 1e4
            raise ValueError(f"--budget={budget:g} is below every cache: the smallest is {spec}, from {enough:g} on")
    for spec in dict.fromkeys(fixed):
        name, options = parse_preset(spec)
        caches.append((spec, spec, None, preset(name, **options)))
    return caches, refused


def _waiting_bytes(name: str, options: Mapping[str, Any], model: sj.Decoder) -> int:
    """What the slots of a preset take in which `every` tokens wait, in the bits that it keeps tokens in."""
    once = preset(name, **options)
    twice = preset(name, **{**options, "every": 2 * options["every"]})
    return total_bytes(twice, model) - total_bytes(once, model)


def run(
    values: flags.FlagValues, model: sj.Decoder, tokenizer: Tokenizer, board: dict[str, Any],
    tasks: Mapping[str, list[Encoded]], caches: Sequence[Labelled], text: Sequence[int], signals: StopSignals,
) -> None:  # fmt: skip
    """What is not on the board yet, written there and on disk after every task; a signal ends it after that."""
    rows = {row["label"]: row for row in board["rows"]}
    length = board["length"]
    reader = ContextReader(model, tokenizer, values.moment, values.chunk_size, round(values.keep_gb * 1e9))
    todo = [(cache, task) for cache in caches for task in tasks if task not in rows.get(cache[0], {}).get("tasks", {})]
    newest = None
    with progress_bar(total=len(todo) * values.samples, unit=" examples") as bar:
        for (label, method, budget, cache), task in todo:
            if signals.received:
                return
            if newest not in (None, label):  # no other cache runs its programs: those of dozens took gigabytes
                jax.clear_caches()
            newest = label
            bar.set_description(f"{label} {task}")
            if label not in rows:
                size = total_bytes(cache, model)
                rows[label] = {"label": label, "method": method, "budget": budget, "cache": describe_cache(cache),
                               "state_bytes": size, "bytes_per_token": size / length, "tasks": {},
                               "timing": {}}  # fmt: skip
                board["rows"].append(rows[label])
            row = rows[label]
            if text and "perplexity" not in row:
                row["perplexity"] = perplexity_behind(reader, cache, text, length=length,
                                                      scored=min(_SCORED, length // 4))  # fmt: skip
            done = answer(reader, cache, tasks[task], batch_size=min(values.batch_size, values.samples),
                          answer_tokens=values.answer_tokens, progress=bar.update)  # fmt: skip
            mean, error = mean_and_error(done.scores)
            row["tasks"][task] = {"mean": mean, "standard_error": error, "scores": done.scores}
            row["timing"][task] = {"read": done.read_per_second, "written": done.written_per_second}
            summarise(row)
            if values.json:
                write_json(values.json, board)


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
