"""Compare caches on one long text: perplexity and memory, as a table, as JSON and as a picture.

    python -m infer.perplexity --input=book.txt
    python -m infer.perplexity --input=book.txt --model=Llama-3.2-1B --max_tokens=200000 \\
        --cache=dense --cache=window:window=2048 --cache=streaming_llm:sinks=4,window=2044
    python -m infer.perplexity --input=builtin --dense_memory=0.5 --png=out/half_a_gigabyte.png

A dense cache keeps every token, so it has an end: --dense_capacity or --dense_memory says where; the picture marks it.
The first columns of the table end where the model's training length ends.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from absl import flags

import streamjax as sj
from streamjax.checkpoints import user_path
from streamjax.commands import comparison
from streamjax.commands.flags.cache import CACHE_HELP, parse_cache
from streamjax.commands.flags.checks import refuse_empty
from streamjax.commands.flags.meshes import define_cache_mesh, meshes_of
from streamjax.commands.flags.model import define_model, define_side_network, define_text, load_model
from streamjax.commands.shell.input_files import BUILTIN
from streamjax.commands.shell.outputs import check_outputs, write_json
from streamjax.commands.shell.runner import give, run_command
from streamjax.evaluation import plot_trials
from streamjax.kv.description import describe_cache


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("input", BUILTIN, "A text file; builtin is held-out text that comes with Python.",
                        flag_values=values)  # fmt: skip
    define_model(values)
    define_side_network(values)
    define_text(values)
    flags.DEFINE_multi_string("cache", ["dense", "window", "streaming_llm"], f"May be repeated. {CACHE_HELP}",
                              flag_values=values)  # fmt: skip
    define_cache_mesh(values)
    flags.DEFINE_integer("max_tokens", None, "Stop after so many tokens.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("dense_capacity", None, "Tokens that a dense cache may hold; 8 times the length the model was "
                         "trained at by default.", lower_bound=1, flag_values=values)  # fmt: skip
    flags.DEFINE_float("dense_memory", None, "Gigabytes that a dense cache may take.", lower_bound=0,
                       flag_values=values)  # fmt: skip
    flags.DEFINE_string("json", "out/perplexity.json", "Where the numbers go; empty for nowhere.", flag_values=values)
    flags.DEFINE_string("png", "out/perplexity.png", "Where the picture goes; empty for nowhere.", flag_values=values)
    refuse_empty(values, "input")


def body(values: flags.FlagValues) -> None:
    check_outputs(reads=values.input, json=values.json, png=values.png)
    model, tokenizer = load_model(values, values.cache)
    trained = model.config.max_position
    ids, bytes_per_token = comparison.read_text(
        values.input, tokenizer, values.max_tokens, values.errors, values.parse_special
    )
    capacity = min(values.dense_capacity or 8 * trained, len(ids) + 1)
    memory = None if values.dense_memory is None else values.dense_memory * 1e9
    capacity = comparison.dense_capacity(model, capacity, memory)
    mesh = meshes_of(values).cache
    caches = {spec: parse_cache(spec, trained, capacity, on_mesh=mesh is not None) for spec in values.cache}
    sessions = {
        spec: sj.Session(model, tokenizer, cache, chunk_size=values.chunk_size, cache_mesh=mesh)
        for spec, cache in caches.items()
    }
    made = {spec: partial(sessions.__getitem__, spec) for spec in sessions}
    trials, stopped = comparison.run_sessions(made, ids)
    names = {spec: describe_cache(session.cache) for spec, session in sessions.items()}
    content = {
        "model": values.model,
        "input": values.input,
        "tokens": len(ids),
        "bytes_per_token": bytes_per_token,
        "trained_length": trained,
        "runs": [{"cache": names[t.name], **t.to_json_dict(bytes_per_token)} for t in trials],
    }

    def draw() -> None:
        title = f"{Path(values.model).name} on {Path(values.input).name}"
        plot_trials(trials, user_path(values.png), title=title, trained_length=trained)

    def report() -> None:
        print(f"{Path(values.model).name}, {len(ids):,} tokens of {values.input}: perplexity a token (bits a byte)")
        print(comparison.table(trials, [trained], bytes_per_token))
        for spec, name in names.items():
            print(f"  {spec}: {name}")

    write = partial(write_json, values.json, content)
    give(report, [("numbers", values.json, write), ("picture", values.png, draw)], stopped)


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
