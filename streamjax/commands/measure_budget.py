"""Measure what a model's layers attend to in a text, for the caches that divide one budget over the layers by it.

    python -m train.measure_budget --model=FOLDER --budget=cake --input=book.txt --output=cake.safetensors
    python -m infer.stream --model=FOLDER --input=other.txt --cache=cake:calibration=cake.safetensors,size=480

--budget names the preset: cake (arXiv 2503.12491) measures entropy and variance of the attention of the last
--queries, prefix_kv (arXiv 2412.03409) the share of attention that the best tokens hold, d2o (arXiv 2406.13035) how
dense it is, both of all queries by default. The attention of the queries to the whole text is in memory at once, for
each layer.
"""

from __future__ import annotations

import numpy as np
from absl import flags

import streamjax as sj
from streamjax.commands.comparison import read_text
from streamjax.commands.flags.model import define_read_text, load_model
from streamjax.commands.shell.outputs import check_outputs, in_made_folder
from streamjax.commands.shell.runner import run_command

BUDGETS = {"cake": sj.kv.Preferences(), "prefix_kv": sj.kv.Prefixes(), "d2o": sj.kv.Density()}
CAKES_QUERIES = 32


def define(values: flags.FlagValues) -> None:
    whole = flags.DEFINE_integer
    define_read_text(values)
    flags.DEFINE_enum("budget", "cake", list(BUDGETS), "The preset whose budget is measured.", flag_values=values)
    flags.DEFINE_string("output", "out/budget.safetensors", "Where the calibration goes.", flag_values=values)
    whole("max_tokens", 1024, "Tokens of the text that are read.", lower_bound=2, flag_values=values)
    whole("queries", None, f"Newest tokens that are asked; by default {CAKES_QUERIES} for cake, all for the others.",
          lower_bound=1, flag_values=values)  # fmt: skip


def body(values: flags.FlagValues) -> None:
    check_outputs(output=values.output)
    model, tokenizer = load_model(values)
    ids, _ = read_text(values.input, tokenizer, values.max_tokens, values.errors, values.parse_special)
    queries = values.queries or (CAKES_QUERIES if values.budget == "cake" else None)
    budget = BUDGETS[values.budget]
    measured = sj.measure_budget(model, np.array([ids], np.int32), budget, queries=queries)
    measured.save(in_made_folder(values.output))
    layers = len(measured.table)
    sizes = budget.sizes(100 * layers, layers, measured.numbers)
    print(f"of 100 tokens a layer, {layers} layers keep: {', '.join(map(str, sizes))}")
    print(f"use them: --cache={values.budget}:calibration={values.output}")


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
