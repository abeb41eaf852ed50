"""Train a side network, which recalls what a frozen model has read long ago, for the cache that remembers it.

    python -m train.side_network --model=FOLDER --input=book.txt --output=side.safetensors
    python -m infer.perplexity --model=FOLDER --side_network=side.safetensors --input=other.txt --cache=long_mem

The model stays as it is. The text is read as --batch_size streams, each a part of it, --seq_len tokens a step; what
leaves the window of --cache goes to a bank, and the side network, which has a layer for every --reduction of the
model's, learns to predict with what it finds there. The last line says what the latest steps cost beside what the model
by itself says of the same tokens. Ctrl-C writes the network as it is. LongMem: arXiv 2306.07174.
"""

from __future__ import annotations

import numpy as np
from absl import flags

import streamjax as sj
from streamjax.commands.comparison import read_text
from streamjax.commands.flags.cache import CACHE_HELP, parse_cache
from streamjax.commands.flags.model import define_read_text, load_model
from streamjax.commands.shell.outputs import check_outputs, in_made_folder
from streamjax.commands.shell.runner import run_command
from streamjax.commands.shell.training_steps import run_steps
from streamjax.kv.cascade import Cascade
from streamjax.kv.tiers.bank import Bank
from streamjax.models.side_network import SideConfig
from streamjax.streaming.side_networks import save_side_network
from streamjax.training.heads.side_network import SideStep, SideTraining, stretches_of, train_side_network

LATEST = 20  # steps whose mean is told


def define(values: flags.FlagValues) -> None:
    number, whole = flags.DEFINE_float, flags.DEFINE_integer
    define_read_text(values)
    flags.DEFINE_string("output", "out/side.safetensors", "Where the side network goes.", flag_values=values)
    flags.DEFINE_string("cache", "long_mem", f"What streams keep; it ends in a bank. {CACHE_HELP}", flag_values=values)
    whole("max_tokens", 1 << 22, "Tokens of the text that are read.", lower_bound=2, flag_values=values)
    whole("layer", None, "Of the model, whose keys and values are remembered, from 0; by default seven tenths of the "
          "way up.", lower_bound=0, flag_values=values)  # fmt: skip
    whole("reduction", 2, "Layers of the model for each layer of the side network.", lower_bound=1, flag_values=values)
    whole("steps", SideTraining.steps, "Stretches of every stream.", lower_bound=1, flag_values=values)
    number("learning_rate", SideTraining.learning_rate, "The highest.", flag_values=values)
    number("weight_decay", SideTraining.weight_decay, "Of AdamW.", flag_values=values)
    number("scale", SideTraining.scale, "How much of its own a side layer adds at the beginning; 1 in the paper.",
           flag_values=values)  # fmt: skip
    whole("seq_len", 256, "Tokens of each stream in a step.", lower_bound=1, flag_values=values)
    whole("batch_size", 8, "Streams.", lower_bound=1, flag_values=values)


def body(values: flags.FlagValues) -> None:
    check_outputs(output=values.output)
    model, tokenizer = load_model(values, [values.cache])
    config = SideTraining(values.steps, values.learning_rate, values.weight_decay, values.scale)
    side = SideConfig.for_model(model.config, values.layer, values.reduction)
    cache = parse_cache(values.cache, model.config.max_position)
    if not isinstance(cache, Cascade) or not isinstance(cache.tiers[-1], Bank):
        raise ValueError(f"--cache={values.cache} remembers nothing for a side network: use long_mem")
    ids, _ = read_text(values.input, tokenizer, values.max_tokens, values.errors, values.parse_special)
    stretches = stretches_of(np.array(ids), values.batch_size, values.seq_len)
    losses: list[float] = []

    def describe(step: SideStep) -> str:
        losses.append(step.loss)
        return f"{np.mean(losses[-LATEST:]):.4f} nats a token"

    ran = run_steps(model, train_side_network(model, side, cache, stretches, config), config.steps, describe)
    done = ran.done
    save_side_network(ran.step.model, in_made_folder(values.output), done * values.seq_len * values.batch_size)
    print(f"{ran} in the latest {min(done, LATEST)}")
    print(f"the model without it: {_without(model, values, cache, np.array(ids), done):.4f} nats, of the same tokens")
    print(f"use it: --side_network={values.output} --cache={values.cache}")
    ran.end()


def _without(model: sj.Decoder, values: flags.FlagValues, cache: Cascade, ids: np.ndarray, done: int) -> float:
    """What the model by itself says of the tokens of the latest steps, behind one stretch that it reads first."""
    stretches = stretches_of(ids, values.batch_size, values.seq_len)
    skipped = max(done - LATEST, 0)
    read = [tokens for _, tokens in zip(range(done), stretches, strict=False)]
    state = sj.init_state(model, cache, values.batch_size)
    first = max(skipped - 4, 0)
    _, nats = sj.score(model, state, np.concatenate(read[first:], axis=1), values.seq_len)
    return float(np.asarray(nats)[:, (skipped - first) * values.seq_len :].mean())


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
