"""Train the convolutions by which tokens that a cache cannot keep flow into the slots of those that it keeps.

    python -m train.convolutions --model=FOLDER --input=book.txt --output=kernels.safetensors
    python -m infer.stream --model=FOLDER --input=new.txt --cache=lococo:kernels=kernels.safetensors,window=64,size=128

The model is frozen. It reads stretches of the text under the cache, and the loss is what the tokens behind the first
merges cost; --steps=0 writes the first weights, which know nothing. --window, --size and --every are the options of the
cache that is trained for; the command prints them at its end. Ctrl-C writes the convolutions as they are. LoCoCo: arXiv
2406.05317.
"""

from __future__ import annotations

import numpy as np
from absl import flags

from streamjax.commands.comparison import read_text
from streamjax.commands.flags.model import define_read_text, load_model
from streamjax.commands.shell.outputs import check_outputs, in_made_folder
from streamjax.commands.shell.runner import run_command
from streamjax.commands.shell.training_steps import run_steps
from streamjax.training.heads.convolutions import ConvolutionConfig, as_file, first_weights, train_convolutions
from streamjax.training.heads.text_rows import text_rows


def define(values: flags.FlagValues) -> None:
    number, whole, given = flags.DEFINE_float, flags.DEFINE_integer, ConvolutionConfig
    define_read_text(values)
    flags.DEFINE_string("output", "out/kernels.safetensors", "Where the convolutions go.", flag_values=values)
    whole("max_tokens", 1 << 20, "Tokens of the text that are read.", lower_bound=2, flag_values=values)
    whole("seed", 0, "Of the rows and the first weights.", lower_bound=0, flag_values=values)
    whole("steps", given.steps, "Of Adam; 0: the first weights.", lower_bound=0, flag_values=values)
    number("learning_rate", given.learning_rate, "Of Adam.", flag_values=values)
    whole("slots", given.slots, "Of each head that a convolution fills.", lower_bound=1, flag_values=values)
    whole("width", given.width, "Tokens that it sees at once, an odd number.", lower_bound=1, flag_values=values)
    number("blend", given.blend, "Share of what it says, at first.", lower_bound=0, upper_bound=1, flag_values=values)
    whole("window", given.window, "Newest tokens that stay as they are.", lower_bound=1, flag_values=values)
    whole("size", given.size, "Other tokens of each head, the filled slots among them.", lower_bound=1,
          flag_values=values)  # fmt: skip
    whole("every", given.every, "Tokens after which a cache chooses and merges.", lower_bound=1, flag_values=values)
    whole("seq_len", None, "Tokens of a row; by default twice what the cache holds.", lower_bound=2,
          flag_values=values)  # fmt: skip
    whole("batch_size", 1, "Rows of a step.", lower_bound=1, flag_values=values)


def body(values: flags.FlagValues) -> None:
    check_outputs(output=values.output)
    shape = {name: getattr(values, name) for name in ("slots", "width", "blend", "window", "size", "every")}
    config = ConvolutionConfig(max(values.steps, 1), values.learning_rate, **shape)
    length = values.seq_len or 2 * config.held
    if length <= config.held:
        raise ValueError(f"--seq_len={length}: the cache holds {config.held} tokens, and what comes behind them counts")
    model, tokenizer = load_model(values)
    ids, _ = read_text(values.input, tokenizer, values.max_tokens, values.errors, values.parse_special)
    batches = text_rows(np.array(ids), length, values.batch_size, values.seed)
    ran = None
    if values.steps:
        ran = run_steps(model, train_convolutions(model, batches, config, values.seed), config.steps)
        print(ran)
    weights = ran.step.weights if ran else first_weights(model, config, values.seed)
    done = ran.done * length * values.batch_size if ran else 0
    as_file(model, weights, done).save(in_made_folder(values.output))
    options = f"window={config.window},size={config.size},every={config.every}"
    print(f"use them: --cache=lococo:kernels={values.output},{options}")
    if ran:
        ran.end()


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
