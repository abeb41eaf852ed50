"""Ask a model about what it read long ago: passkeys and other facts in contexts of any length, under several caches.

    python -m infer.recall --demo             # the model that comes with streamjax, at 128 times its training length
    python -m infer.recall --lengths=1K,16K,1M --depths=11 --samples=2 --cache=hsa:capacity=1048576
    python -m infer.recall --model=Llama-3.2-1B --task=passkey --task=multi_key --lengths=4K,32K \\
        --cache=dense:capacity=33000 --cache=streaming_llm --cache=inf_llm

Contexts are made as they are read and never held: 16M tokens are as easy as a thousand. An answer counts if greedy
decoding gives it to the letter. A model is asked in words that it knows: see --phrasing. The tasks: passkey (one key),
multi_key (one of several named keys), multi_value (all values of a name), variable_tracking (all names of a value),
multi_turn (several questions about one context).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

import streamjax as sj
from streamjax.checkpoints import user_path
from streamjax.commands.flags.cache import CACHE_HELP, parse_cache
from streamjax.commands.flags.model import define_model, define_side_network, load_model, shipped_model
from streamjax.commands.shell.outputs import check_outputs, write_json
from streamjax.commands.shell.progress import progress_bar
from streamjax.commands.shell.runner import give, run_command
from streamjax.commands.shell.signals import Terminated, ending_signals
from streamjax.data.recall.chat_frames import chat_frame
from streamjax.data.recall.haystack import KINDS
from streamjax.data.recall.phrasings import PHRASINGS, default_phrasing
from streamjax.data.recall.tasks import TASKS, make_problem, stream_context
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.evaluation import human_bytes
from streamjax.evaluation.recall import Cell, run_recall
from streamjax.kv.presets.registry import Built

DEMO_LENGTHS = (512, 8192, 131072)
_NOT_OF_DEMO = ("model", "tokenizer", "mesh", "cache", "task", "lengths", "depths", "samples", "needles", "phrasing",
                "haystack", "batch_size")  # fmt: skip
ROOM = 1024  # tokens of questions and answers that a cache without an end must hold beside the context


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("demo", False, "The demonstration: passkeys at up to 131,072 tokens, with the shipped models.",
                      flag_values=values)  # fmt: skip
    define_model(values)
    define_side_network(values)
    values.set_default("model", shipped_model("hsa_recall"))
    flags.DEFINE_multi_enum("task", ["passkey"], TASKS, "May be repeated.", flag_values=values)
    flags.DEFINE_list("lengths", ["1K", "8K", "64K"], "Tokens of context; K and M are 1,024 and 1,024 squared.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_integer("depths", 5, "Places at which the fact stands, from the start to the end.", lower_bound=1,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_integer("samples", 4, "Problems at each length and depth.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("needles", 4, "Facts in a context, for all tasks but passkey.", lower_bound=1,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_enum("phrasing", None, PHRASINGS, "How it is asked: in RULER's manner, through the model's own chat "
                      "template if it has one, or barely for a pass key, as the models that come with streamjax were "
                      "trained. By default passkey for models of bytes, ruler for all others.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_enum("haystack", None, KINDS, "What lies between: drawn sentences, or five sentences repeated. By "
                      "default words with --phrasing=passkey, repeat with ruler.", flag_values=values)  # fmt: skip
    flags.DEFINE_multi_string(
        "cache", None, f"May be repeated; by default one that keeps everything, and streaming_llm. {CACHE_HELP}",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("batch_size", 4, "Contexts read side by side.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the problems.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("json", "out/recall.json", "Where the numbers go; empty for nowhere.", flag_values=values)
    flags.DEFINE_string("png", "out/recall.png", "Where the picture goes; empty for nowhere.", flag_values=values)


def body(values: flags.FlagValues) -> None:
    if values.demo and (given := [name for name in _NOT_OF_DEMO if values[name].present]):
        raise flags.Error(f"--demo asks its own questions: --{given[0]} is for other runs")
    check_outputs(json=values.json, png=values.png)
    runs, trained, title = _demo(values) if values.demo else _asked_for(values)
    cells: list[Cell] = []
    stopped = 0
    with ending_signals(signal.SIGINT):
        try:
            for found in runs:
                cells += found
        except (KeyboardInterrupt, Terminated) as ended:
            if not cells:
                raise
            stopped = ended.number if isinstance(ended, Terminated) else signal.SIGINT

        def write() -> None:
            rows = [cell.to_json_dict() for cell in cells]
            write_json(values.json, {"model": values.model, "trained_length": trained, "runs": rows})

        def draw() -> None:
            from streamjax.evaluation.recall_plot import plot_recall

            plot_recall(cells, user_path(values.png), title=title, trained_length=trained)

        give(lambda: print(table(cells)), [("numbers", values.json, write), ("picture", values.png, draw)], stopped)


def _asked_for(values: flags.FlagValues) -> tuple[Iterator[list[Cell]], int, str]:
    """The runs, one after the other as they are asked for; the model's training length, and a title."""
    lengths = list(dict.fromkeys(parse_length(text) for text in values.lengths or [""]))
    model, tokenizer = load_model(values, values.cache or ())
    trained = model.config.max_position
    phrasing = values.phrasing or default_phrasing(tokenizer)
    for task in values.task:  # what does not fit is told before anything is read
        problem = make_problem(task, None, 0, needles=values.needles, phrasing=phrasing)
        next(stream_context(problem, min(lengths), tokenizer, chat_frame(tokenizer) if phrasing == "ruler" else None))
    whole = max(lengths) + ROOM
    everything = f"dense:capacity={whole}" if model.config.hsa is None else f"hsa:capacity={whole}"
    specs = values.cache or [everything, "streaming_llm"]
    caches = {spec: parse_cache(spec, trained, whole) for spec in specs}
    how = (values.depths, values.samples, min(values.batch_size, values.depths * values.samples))
    runs = (
        _run(values, model, tokenizer, spec, cache, task, length, *how)
        for spec, cache in caches.items()
        for task in dict.fromkeys(values.task)
        for length in lengths
    )
    return runs, trained, f"{Path(values.model).name}, trained on {trained:,} tokens at once"


def _demo(values: flags.FlagValues) -> tuple[Iterator[list[Cell]], int, str]:
    """One task, two models: hierarchical sparse attention, the same with sinks and a window, and dense attention."""
    folder, dense_folder = shipped_model("hsa_recall"), shipped_model("dense_recall")
    if folder is None or dense_folder is None:
        raise ValueError("--demo needs models/ of streamjax's repository: run it in a clone, or give --model=FOLDER")
    tokenizer = sj.load_tokenizer(folder)
    model, dense = sj.load(folder, dtype=values.dtype), sj.load(dense_folder, dtype=values.dtype)
    trained = model.config.max_position
    print(
        f"{model.config.parameter_count / 1e6:.1f}M parameters, trained on contexts of {trained:,} tokens, asked for a "
        f"pass key in contexts of up to {DEMO_LENGTHS[-1]:,}: {DEMO_LENGTHS[-1] // trained} times as long"
    )

    def runs() -> Iterator[list[Cell]]:
        for length in DEMO_LENGTHS:
            cache = sj.kv.preset("hsa", capacity=length + ROOM)
            yield _run(values, model, tokenizer, "HSA", cache, "passkey", length, 3, 2, 6)
        for length in DEMO_LENGTHS[:2]:
            cache = sj.kv.preset("streaming_llm", sinks=4, window=508)
            yield _run(values, model, tokenizer, "sinks + window", cache, "passkey", length, 3, 2, 6)
            cache = sj.kv.preset("dense", capacity=length + ROOM)
            yield _run(values, dense, tokenizer, "dense, RoPE", cache, "passkey", length, 3, 2, 6)

    return runs(), trained, f"pass keys after training on {trained:,} tokens at once"


def _run(
    values: flags.FlagValues,
    model: sj.Decoder,
    tokenizer: Tokenizer,
    name: str,
    cache: Built,
    task: str,
    length: int,
    depths: int,
    samples: int,
    batch_size: int,
) -> list[Cell]:
    batches = -(-depths * samples // batch_size)
    label = f"{name} {task} {length:,}"
    total = batches * length * batch_size
    with progress_bar(total=total, desc=label, unit=" tokens") as bar:

        def show(tokens: int) -> None:
            bar.update(tokens * batch_size)

        return run_recall(
            model,
            tokenizer,
            name,
            cache,
            task=task,
            length=length,
            depths=[round(float(d), 4) for d in np.linspace(0, 1, depths)] if depths > 1 else [0.5],
            samples=samples,
            haystack=values.haystack,
            needles=values.needles,
            phrasing=values.phrasing,
            batch_size=batch_size,
            chunk_size=values.chunk_size,
            seed=values.seed,
            progress=show,
        )


def parse_length(text: str) -> int:
    """A number of tokens, such as 4096, 4K or 1M.

    Raises:
      ValueError: anything else.
    """
    found = re.fullmatch(r"(\d+)([KkMm]?)", text.strip())
    if not found or not int(found[1]):
        raise ValueError(f"--lengths: {text!r} is no number of tokens; write 4096, 4K or 1M")
    return int(found[1]) * {"": 1, "K": 2**10, "M": 2**20}[found[2].upper()]


def table(cells: list[Cell]) -> str:
    """The run as text: accuracy over all depths and the worst depth, speed and memory."""
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.cache, cell.length), []).append(cell)
    rows = [["task", "cache", "tokens", "right", "worst depth", "tokens/s", "state a stream"]]
    for (task, cache, length), found in groups.items():
        right, asked = sum(c.right for c in found), sum(c.asked for c in found)
        worst = min(found, key=lambda c: c.accuracy)
        rows.append(
            [task, cache, f"{length:,}", f"{100 * right / asked:.1f}% of {asked}",
             f"{100 * worst.accuracy:.0f}% at {100 * worst.depth:.0f}%", f"{found[0].tokens_per_second:,.0f}",
             human_bytes(found[0].cache_bytes)]
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
