"""Train heads that guess how a model goes on, so that it reads several tokens in one pass.

    python -m train.draft_heads --model=FOLDER --output=heads.safetensors
    python -m train.draft_heads --model=FOLDER --input=answers.txt --steps=5000 --output=heads.safetensors
    python -m train.draft_heads --model=FOLDER --input=answers.txt --start=heads.safetensors --output=more.safetensors
    python -m infer.chat --model=FOLDER --draft=heads:heads.safetensors

The model is frozen, and what it says does not change: only how fast it does. Heads learn what the model itself says
behind each token of a text, best of one that is like its own answers. hydra: heads that guess one after another from
the model's last hidden state (arXiv 2402.05109). ppd: prompt tokens at which the model itself says what comes later
(parallel prompt decoding, arXiv 2405.18628): far fewer numbers, but each guess costs more of a pass. `right` says how
often the first guess of each is the model's own choice. Ctrl-C writes the heads as they are. What the model computes of
a row is kept in memory (hydra), so a text that is small enough to come again and again, some 800,000 tokens of a model
of 576 channels, is read by the model once. An answers' text with <|im_end|> and the like wants --parse_special.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from absl import flags

from streamjax.commands.comparison import read_text
from streamjax.commands.flags.checks import refuse_empty
from streamjax.commands.flags.model import define_read_text, load_model
from streamjax.commands.shell.outputs import check_outputs, in_made_folder
from streamjax.commands.shell.runner import run_command
from streamjax.commands.shell.training_steps import run_steps
from streamjax.streaming.speculative.heads.hydra import HydraWeights
from streamjax.streaming.speculative.heads.hydra_file import HydraHeads
from streamjax.streaming.speculative.heads.prompt_file import PromptTokens
from streamjax.training.heads.drafting import (
    DraftHeadsConfig,
    DraftStep,
    as_file,
    frequent_ids,
    from_file,
    train_draft_heads,
)
from streamjax.training.heads.prompting import as_file as as_prompt_file
from streamjax.training.heads.prompting import train_prompt_tokens
from streamjax.training.heads.text_rows import text_rows

RATES = {"hydra": DraftHeadsConfig.learning_rate, "ppd": 1e-2}  # by kind, the paper's for prompt tokens
KINDS = tuple(RATES)


def define(values: flags.FlagValues) -> None:
    whole = flags.DEFINE_integer
    define_read_text(values)
    flags.DEFINE_string("output", "out/draft_heads.safetensors", "Where the heads go.", flag_values=values)
    flags.DEFINE_enum("kind", KINDS[0], KINDS, "What guesses.", flag_values=values)
    flags.DEFINE_string("start", None, "Heads to go on from, of an earlier run with the same --heads and --width; of "
                        "--kind=hydra alone.", flag_values=values)  # fmt: skip
    refuse_empty(values, "start")
    whole("heads", DraftHeadsConfig.heads, "Tokens behind the next one that are guessed.", lower_bound=1,
          flag_values=values)  # fmt: skip
    whole("width", DraftHeadsConfig.width, "Of the hidden layers of hydra's heads.", lower_bound=1, flag_values=values)
    whole("vocabulary", 8192, "Frequent tokens of the text that are guessed; fewer cost less.", lower_bound=1,
          flag_values=values)  # fmt: skip
    whole("max_tokens", 1 << 20, "Tokens of the text that are read.", lower_bound=2, flag_values=values)
    whole("seed", 0, "Of the rows and the first weights.", lower_bound=0, flag_values=values)
    whole("steps", DraftHeadsConfig.steps, "Batches.", lower_bound=1, flag_values=values)
    flags.DEFINE_float("learning_rate", None, "The highest; by default 3e-4 for hydra, 1e-2 for ppd.",
                       flag_values=values)  # fmt: skip
    whole("seq_len", 256, "Tokens of a row.", lower_bound=2, flag_values=values)
    whole("batch_size", 4, "Rows of a step.", lower_bound=1, flag_values=values)


def body(values: flags.FlagValues) -> None:
    check_outputs(output=values.output)
    if values.start is not None and values.kind != "hydra":
        raise ValueError(f"--start={values.start}: only heads of --kind=hydra go on from a file")
    model, tokenizer = load_model(values)
    rate = RATES[values.kind] if values.learning_rate is None else values.learning_rate
    config = DraftHeadsConfig(values.heads, values.steps, rate, values.width)
    if values.seq_len <= config.heads + 1:
        raise ValueError(f"--seq_len={values.seq_len} has no place for {config.heads} heads: take more tokens")
    read, _ = read_text(values.input, tokenizer, values.max_tokens, values.errors, values.parse_special)
    text = np.array(read)
    ids = frequent_ids(text, values.vocabulary)
    steps: Iterator[DraftStep]
    if values.kind == "hydra":
        rows = text_rows(text, values.seq_len, values.batch_size, values.seed, apart=values.seq_len)
        start, before = (None, 0) if values.start is None else from_file(model, values.start)
        steps = train_draft_heads(model, ids, rows, config, values.seed, start)
    else:
        before, rows = 0, text_rows(text, values.seq_len, values.batch_size, values.seed)
        steps = train_prompt_tokens(model, ids, rows, config, values.seed)
    ran = run_steps(model, steps, config.steps, _describe)
    weights, tokens = ran.step.weights, before + ran.done * values.seq_len * values.batch_size
    file: HydraHeads | PromptTokens
    if isinstance(weights, HydraWeights):
        file = as_file(model, ids, weights, tokens)
    else:
        file = as_prompt_file(model, ids, weights, tokens)
    file.save(in_made_folder(values.output))
    print(ran)
    print(f"use them: --draft=heads:{values.output}")
    ran.end()


def _describe(step: DraftStep) -> str:
    right = ", ".join(f"{share:.3f}" for share in step.right)
    return f"loss {step.loss:.4f}, right {right}"


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
