"""The demonstration (`make demo`): a small model reads two hundred times its training length, under three caches.

    python -m infer.demo
    python -m infer.demo --tokens=1000000          # for as long as you like: memory stays what it is

The model is a byte-level one that streamjax trained itself (models/stdlib_byte); the text is held out from its
training. A dense cache keeps everything: it is stopped at 8 times the training length, when it holds 8 times what the
two others hold. The window keeps the newest tokens, as many as the model was trained on; the third cache keeps the
first four tokens and the newest others, at the same budget (StreamingLLM, arXiv 2309.17453).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags

import streamjax as sj
from streamjax.commands import comparison
from streamjax.commands.flags.model import define_model, load_model
from streamjax.commands.shell.outputs import check_outputs, write_json
from streamjax.commands.shell.runner import Stopped, run_command
from streamjax.data import corpus_text
from streamjax.data.text.control_characters import escape_controls
from streamjax.evaluation import Trial, human_bytes, plot_trials

DENSE_FACTOR = 8  # dense may hold this many times the training length
LONG_FACTOR = 100  # what the demonstration promises, in training lengths
SINKS = 4
COLLAPSE = 1.25  # perplexity, against the cache with sinks, from which on a cache is said to have collapsed
CONTINUATION = 240  # tokens


def define(values: flags.FlagValues) -> None:
    define_model(values)
    flags.DEFINE_integer("tokens", None, "Tokens to read; 200 times the training length by default.", lower_bound=1,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_float("seconds", 70.0, "Most time for one cache, on a slow machine.", lower_bound=0,
                       flag_values=values)  # fmt: skip
    flags.DEFINE_string("out", "out", "Folder for demo.png and demo.json.", flag_values=values)


def verdict(dense: Trial, window: Trial, sinks: Trial, trained: int) -> list[str]:
    """What the numbers say, in words; `trained` is the model's training length."""
    lines = []
    end = len(dense.nats)
    if end > trained:
        past, stable = dense.part(trained, end).perplexity, sinks.part(trained, end).perplexity
        meaning = (
            "beyond its training length the model has lost its way"
            if past > COLLAPSE * stable
            else "the model copes with a longer context that far; memory is what ends it"
        )
        lines.append(
            f"dense: perplexity {past:.4g} from token {trained:,} to {end:,}, where sinks + window has {stable:.4g}: "
            f"{meaning}."
        )
    if dense.ended:
        everything = sum(dense.memory.slot_bytes) * len(sinks.nats)
        lines.append(
            f"It was stopped ({dense.ended}) holding {human_bytes(dense.memory.in_use(end))}, {DENSE_FACTOR} times the "
            f"others' budget; all {len(sinks.nats):,} tokens would have taken {human_bytes(everything)}."
        )
    first, later = window.part(0, trained).perplexity, window.part(trained).perplexity
    stable = sinks.part(trained, len(window.nats)).perplexity
    meaning = (
        "it has collapsed without the first tokens, on which attention rests"
        if later > COLLAPSE * stable
        else "on this model the window does not collapse, it does without the first tokens"
    )
    lines.append(
        f"window: perplexity {first:.4g} while the first tokens are there, {later:.4g} once they have left, where "
        f"sinks + window has {stable:.4g}: {meaning}."
    )
    times = len(sinks.nats) / trained
    lines.append(
        f"sinks + window: {times:,.0f} times the training length in {human_bytes(sinks.memory.allocated)}; perplexity "
        f"{sinks.part(0, trained).perplexity:.4g} at first, {sinks.part(trained).perplexity:.4g} after."
    )
    if times < LONG_FACTOR:
        lines.append(f"That is less than the {LONG_FACTOR} times that this is meant to show: it was cut short.")
    return lines


def body(values: flags.FlagValues) -> None:
    out = Path(values.out).expanduser()
    check_outputs(out=str(out / "demo.json"))
    model, tokenizer = load_model(values)
    trained = model.config.max_position
    text = corpus_text("test")
    wanted = values.tokens or 2 * LONG_FACTOR * trained
    ids = tokenizer.encode(text[: 8 * wanted])[:wanted]
    bytes_per_token = len(tokenizer.decode(ids).encode()) / len(ids)
    caches = {
        "dense": sj.kv.preset("dense", capacity=DENSE_FACTOR * trained),
        "window": sj.kv.preset("window", window=trained),
        "sinks + window": sj.kv.preset("streaming_llm", sinks=SINKS, window=trained - SINKS),
    }
    sessions = {
        name: sj.Session(model, tokenizer, cache, sampler=sj.Sampler(temperature=0.7), chunk_size=values.chunk_size)
        for name, cache in caches.items()
    }
    model_name = Path(values.model).name
    print(
        f"{model_name}, {model.config.parameter_count / 1e6:.1f}M parameters, trained on {trained:,} tokens "
        f"at once, reads {len(ids):,} that it has not seen: {len(ids) / trained:,.0f} times as many"
    )
    trials, stopped = comparison.run_sessions(sessions, ids, values.seconds)
    if stopped:
        raise Stopped(128 + stopped, "error: interrupted")
    print("\nperplexity a token (bits a byte)")
    print(comparison.table(trials, [trained, DENSE_FACTOR * trained], bytes_per_token), end="\n\n")
    dense, window, sinks = trials
    for line in verdict(dense, window, sinks, trained):
        print(line)
    title = f"{model_name} reads {len(ids):,} tokens of held-out text"
    plot_trials(trials, out / "demo.png", title=title, trained_length=trained)
    runs = [trial.to_json_dict(bytes_per_token) for trial in trials]
    write_json(str(out / "demo.json"), {"tokens": len(ids), "trained_length": trained, "runs": runs})
    print(f"\npicture: {out / 'demo.png'}   numbers: {out / 'demo.json'}")
    session = sessions["sinks + window"]
    tail = tokenizer.decode(np.asarray(ids[: session.tokens_seen])[-CONTINUATION:].tolist())
    print(f"\nThe text ends like this after {session.tokens_seen:,} tokens:\n{indent(tail)}\nand the model goes on:")
    print(indent("".join(session.generate(max_new_tokens=CONTINUATION))))


def indent(text: str) -> str:
    """Text as a quotation."""
    return "\n".join("    | " + escape_controls(line) for line in text.splitlines())


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
