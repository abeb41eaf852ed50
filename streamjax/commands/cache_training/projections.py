"""Train orthogonal directions of every head's keys and values, and search how many of them each head keeps.

    python -m train.projections --model=FOLDER --input=book.txt --share=0.5 --output=projections.safetensors
    python -m infer.stream --model=FOLDER --input=other.txt --cache=matryoshka_kv:projections=projections.safetensors

The model is frozen. Directions begin as the principal ones of the text's beginning (--steps=0 leaves them so), and are
trained on stretches of it with a rank drawn for every head. The search reads --search_tokens some times for every head
that it cuts; with --share=1 nothing is cut, and options of the cache say how much is left. Ctrl-C ends the training
early, and the search follows. MatryoshkaKV: arXiv 2410.14731.
"""

from __future__ import annotations

import numpy as np
from absl import flags

from streamjax.commands.comparison import read_text
from streamjax.commands.flags.model import define_read_text, load_model
from streamjax.commands.shell.outputs import check_outputs, in_made_folder
from streamjax.commands.shell.runner import run_command
from streamjax.commands.shell.training_steps import run_steps
from streamjax.training.heads.projections import (
    ProjectionConfig,
    as_file,
    principal_bases,
    search_ranks,
    train_projections,
)
from streamjax.training.heads.text_rows import text_rows

LONGEST_ROWS = 512  # by default


def define(values: flags.FlagValues) -> None:
    number, whole = flags.DEFINE_float, flags.DEFINE_integer
    define_read_text(values)
    flags.DEFINE_string("output", "out/projections.safetensors", "Where the directions go.", flag_values=values)
    whole("max_tokens", 1 << 20, "Tokens of the text that are read.", lower_bound=2, flag_values=values)
    whole("seed", 0, "Of the rows and the ranks that are drawn.", lower_bound=0, flag_values=values)
    whole("steps", ProjectionConfig.steps, "Of Adam; 0: principal directions.", lower_bound=0, flag_values=values)
    number("learning_rate", ProjectionConfig.learning_rate, "The highest.", flag_values=values)
    number("distilled", ProjectionConfig.distilled, "Share of the loss that is the divergence from the whole model.",
           flag_values=values)  # fmt: skip
    whole("levels", ProjectionConfig.levels, "Equal steps of a head's channels.", flag_values=values)
    number("share", 0.5, "Of all channels, what the search leaves.", lower_bound=0, upper_bound=1, flag_values=values)
    whole("first_tokens", None, "Tokens of the text whose principal directions come first; by default those of a row.",
          lower_bound=2, flag_values=values)  # fmt: skip
    whole("search_tokens", 128, "Tokens that the search compares.", lower_bound=2, flag_values=values)
    whole("seq_len", None, f"Tokens of a row; by default those of the model's training, up to {LONGEST_ROWS:,}.",
          lower_bound=2, flag_values=values)  # fmt: skip
    whole("batch_size", 1, "Rows of a step.", lower_bound=1, flag_values=values)


def body(values: flags.FlagValues) -> None:
    check_outputs(output=values.output)
    model, tokenizer = load_model(values)
    config = ProjectionConfig(max(values.steps, 1), values.learning_rate, values.levels, values.distilled)
    length = values.seq_len or min(model.config.max_position, LONGEST_ROWS)
    ids, _ = read_text(values.input, tokenizer, values.max_tokens, values.errors, values.parse_special)
    text = np.array(ids, np.int32)
    batches = text_rows(text, length, values.batch_size, values.seed)
    first = min(values.first_tokens or length, len(text))
    bases, bounds = principal_bases(model, text[None, :first])
    done = 0
    if values.steps:
        ran = run_steps(model, train_projections(model, bases, batches, config, values.seed), config.steps)
        bases, done = ran.step.bases, ran.done
        print(ran)
    compared = text[None, -min(values.search_tokens, length) :]
    ranks = search_ranks(model, bases, compared, values.share, values.levels)
    as_file(model, bases, ranks, bounds, first + done * values.batch_size * length).save(in_made_folder(values.output))
    left = np.mean([np.mean(rank / bases[i].shape[-1]) for i, rank in ranks.items()])
    print(f"heads keep {left:.3f} of their channels")
    print(f"use them: --cache=matryoshka_kv:projections={values.output}")


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
