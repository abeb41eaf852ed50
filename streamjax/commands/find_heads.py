"""Find the heads of a model that look far back, for the caches that keep all tokens for these heads alone.

    python -m train.find_heads --model=FOLDER --output=heads.json
    python -m train.find_heads --model=FOLDER --output=heads.json --method=razor_attention
    python -m infer.stream --model=FOLDER --input=book.txt --cache=duo_attention:heads=heads.json,full=0.5

duo_attention (arXiv 2410.10819) optimises a gate for each key head on questions about facts in a haystack; Ctrl-C
writes the gates as they are. razor_attention (arXiv 2407.15891) measures, without training, how heads read random
tokens that are repeated. The file has the gates of all key heads; the caches duo_attention, razor_attention and lserve
read it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from absl import flags

import streamjax as sj
from streamjax.checkpoints import user_path
from streamjax.commands.flags.model import define_model, load_model
from streamjax.commands.shell.outputs import check_outputs, write_json
from streamjax.commands.shell.progress import progress_bar
from streamjax.commands.shell.runner import Stopped, run_command
from streamjax.commands.shell.training_steps import no_loss
from streamjax.data.recall.training_rows import RecallRows
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.models.nonfinite import not_finite
from streamjax.training.heads.gates import GateConfig, answer_batches, far_layers, optimise_gates
from streamjax.training.heads.scores import head_scores, protected_heads, repeated_tokens
from streamjax.training.run.signals import StopSignals

METHODS = ("duo_attention", "razor_attention")
LONGEST_ROWS = 4096  # by default; a longer row costs the square of its length
PAPERS_TOKENS = 2500
FAR = 0.5  # the gate from which on a head counts as one that looks far back


def define(values: flags.FlagValues) -> None:
    number, whole = flags.DEFINE_float, flags.DEFINE_integer
    define_model(values)
    delattr(values, "chunk_size")  # rows are read whole
    flags.DEFINE_enum("method", METHODS[0], METHODS, "How heads are found.", flag_values=values)
    flags.DEFINE_string("output", "out/heads.json", "Where the gates go.", flag_values=values)
    whole("seed", 0, "Of the rows, or of the random tokens.", lower_bound=0, flag_values=values)
    whole("steps", GateConfig.steps, "duo_attention: steps of Adam.", flag_values=values)
    number("learning_rate", GateConfig.learning_rate, "duo_attention: the highest, of gates.", flag_values=values)
    number("l1", GateConfig.l1, "duo_attention: weight of the penalty on gates.", flag_values=values)
    whole("sinks", GateConfig.sinks, "duo_attention: first tokens that every head sees.", flag_values=values)
    whole("recent", GateConfig.recent, "duo_attention: newest tokens that every head sees.", flag_values=values)
    whole("seq_len", None, "duo_attention: tokens of a row; by default those of the model's training, up to "
          f"{LONGEST_ROWS:,}.", lower_bound=2, flag_values=values)  # fmt: skip
    whole("batch_size", 1, "duo_attention: rows of a step.", lower_bound=1, flag_values=values)
    whole("tokens", None, f"razor_attention: random tokens; by default {PAPERS_TOKENS:,}, or as many as the model's "
          "training length holds with their repeats.", flag_values=values)  # fmt: skip
    whole("repeats", 4, "razor_attention: how often the tokens are read.", flag_values=values)
    whole("rows", 1, "razor_attention: rows of other tokens.", flag_values=values)
    number("echo", 0.01, "razor_attention: share of the heads that count as echo heads.", flag_values=values)
    number("induction", 0.14, "razor_attention: share that count as induction heads.", flag_values=values)


def body(values: flags.FlagValues) -> None:
    check_outputs(output=values.output)
    model, tokenizer = load_model(values)
    far_layers(model.config)  # so that a model without far heads is told before anything is read
    optimised = values.method == "duo_attention"
    gates, far, about, status = _optimised(values, model, tokenizer) if optimised else _scored(values, model)
    share = round(float(far.mean()), 6)
    name = user_path(values.model).resolve().name
    content = {"method": values.method, "model": name, "full": share, **about, "gates": gates.round(6).tolist()}
    write_json(values.output, content)
    print(f"{int(far.sum())} of {far.size} key heads look far back; gates: {values.output}")
    print(f"use them: --cache={values.method}:heads={values.output},full={share:g}")
    if status:
        raise Stopped(status)


def _optimised(
    values: flags.FlagValues, model: sj.Decoder, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, dict[str, Any], int]:
    """Gates, which heads look far back, what is to be said of the run, and the exit status."""
    config = GateConfig(values.steps, values.learning_rate, values.l1, values.sinks, values.recent)
    length = values.seq_len or min(model.config.max_position, LONGEST_ROWS)
    batches = answer_batches(RecallRows(length, tokenizer), values.batch_size, start=values.seed << 20)
    with (
        StopSignals() as stop,
        progress_bar(total=config.steps, unit="step") as bar,
    ):
        for done, step in enumerate(optimise_gates(model, batches, config), 1):
            loss, distance, gates = float(step.loss), float(step.distance), np.asarray(step.gates, np.float64)
            if not math.isfinite(loss):
                raise no_loss(model, done)
            metrics = f"loss {loss:.4f}, distance {distance:.4f}, mean gate {gates.mean():.3f}"
            bar.set_postfix_str(metrics, refresh=False)
            bar.update()
            if stop.received:
                break
    print(f"step {done} of {config.steps}: {metrics}")
    about = {
        "steps": done, "learning_rate": config.learning_rate, "l1": config.l1, "sinks": config.sinks,
        "recent": config.recent, "seq_len": length, "batch_size": values.batch_size, "seed": values.seed,
        "loss": loss, "distance": distance,
    }  # fmt: skip
    return gates, gates >= FAR, about, 128 + stop.received if stop.received and done < config.steps else 0


def _scored(values: flags.FlagValues, model: sj.Decoder) -> tuple[np.ndarray, np.ndarray, dict[str, Any], int]:
    """The same by scores."""
    fitting = (model.config.max_position - 1) // max(values.repeats, 1)
    length = min(PAPERS_TOKENS, max(fitting, 2)) if values.tokens is None else values.tokens
    tokens = repeated_tokens(model.config, length, values.repeats, values.rows, values.seed)
    scores = head_scores(model, tokens)
    if not all(bool(np.isfinite(score).all()) for score in scores):
        raise not_finite(model, tokens[0], "the scores of the model's heads")
    gates, far = protected_heads(scores, model.config, values.echo, values.induction)
    echo, induction = (np.asarray(score, np.float64) for score in scores)
    print(f"{length} tokens {values.repeats} times: best echo score {echo.max():.3f}, induction {induction.max():.3f}")
    about = {
        "tokens": length, "repeats": values.repeats, "rows": values.rows, "seed": values.seed,
        "echo_share": values.echo, "induction_share": values.induction,
        "echo": echo.round(6).tolist(), "induction": induction.round(6).tolist(),
    }  # fmt: skip
    return gates, far, about, 0


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
