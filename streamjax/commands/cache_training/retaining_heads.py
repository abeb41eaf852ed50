"""Train the small networks that say which tokens of a stream will be asked for, for the cache that keeps those.

    python -m train.retaining_heads --model=FOLDER --output=retaining.safetensors
    python -m train.retaining_heads --model=FOLDER --input=book.txt --tasks=text --output=retaining.safetensors
    python -m infer.stream --model=FOLDER --input=book.txt --cache=locret:retaining=retaining.safetensors

The model is frozen. Rows are stretches of the text, whose last --answer tokens ask for what stands before them
(--tasks=text), or questions about facts in a haystack, whose answers ask (--tasks=recall); with --tasks=both they take
turns. Ctrl-C writes the networks as they are. Locret: arXiv 2410.01805.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from absl import flags

from streamjax.commands.comparison import read_text
from streamjax.commands.flags.model import define_read_text, load_model
from streamjax.commands.shell.outputs import check_outputs, in_made_folder
from streamjax.commands.shell.runner import run_command
from streamjax.commands.shell.training_steps import run_steps
from streamjax.data.recall.training_rows import RecallRows
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.training.heads.gates import answer_batches
from streamjax.training.heads.retaining import RetainingConfig, as_file, text_batches, train_retaining_heads

TASKS = ("both", "text", "recall")
LONGEST_ROWS = 1024  # by default; a longer row costs the square of its length


def define(values: flags.FlagValues) -> None:
    number, whole = flags.DEFINE_float, flags.DEFINE_integer
    define_read_text(values)
    flags.DEFINE_string("output", "out/retaining.safetensors", "Where the networks go.", flag_values=values)
    flags.DEFINE_enum("tasks", TASKS[0], TASKS, "What asks for tokens.", flag_values=values)
    whole("max_tokens", 1 << 20, "Tokens of the text that are read.", lower_bound=2, flag_values=values)
    whole("seed", 0, "Of the rows and the first weights.", lower_bound=0, flag_values=values)
    whole("steps", RetainingConfig.steps, "Batches.", lower_bound=1, flag_values=values)
    whole("updates", RetainingConfig.updates, "Steps of AdamW on each batch.", lower_bound=1, flag_values=values)
    number("learning_rate", RetainingConfig.learning_rate, "The highest.", flag_values=values)
    number("smoothing", RetainingConfig.smoothing, "Weight of the difference between neighbours' scores.",
           flag_values=values)  # fmt: skip
    whole("width", RetainingConfig.width, "Of the hidden layer.", flag_values=values)
    whole("seq_len", None, f"Tokens of a row; by default those of the model's training, up to {LONGEST_ROWS:,}.",
          lower_bound=2, flag_values=values)  # fmt: skip
    whole("answer", None, "Tokens of a stretch of text that ask; by default an eighth of it.", lower_bound=1,
          flag_values=values)  # fmt: skip
    whole("batch_size", 1, "Rows of a step.", lower_bound=1, flag_values=values)


def body(values: flags.FlagValues) -> None:
    check_outputs(output=values.output)
    model, tokenizer = load_model(values)
    config = RetainingConfig(values.steps, values.updates, values.learning_rate, values.width, values.smoothing)
    length = values.seq_len or min(model.config.max_position, LONGEST_ROWS)
    batches = _batches(values, tokenizer, length)
    ran = run_steps(
        model,
        train_retaining_heads(model, batches, config, values.seed),
        config.steps,
        lambda step: f"loss {step.loss:.4f}, {step.found:.3f} of the largest found",
    )
    as_file(model, ran.step, ran.done * length * values.batch_size).save(in_made_folder(values.output))
    print(ran)
    print(f"use them: --cache=locret:retaining={values.output}")
    ran.end()


def _batches(values: flags.FlagValues, tokenizer: Tokenizer, length: int) -> Iterator[dict[str, np.ndarray]]:
    kinds = []
    if values.tasks != "recall":
        ids, _ = read_text(values.input, tokenizer, values.max_tokens, values.errors, values.parse_special)
        answer = values.answer or max(length // 8, 1)
        kinds.append(text_batches(np.array(ids), length, answer, values.batch_size, values.seed))
    if values.tasks != "text":
        kinds.append(answer_batches(RecallRows(length, tokenizer), values.batch_size, start=values.seed << 20))
    while True:
        for batches in kinds:
            yield next(batches)


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
