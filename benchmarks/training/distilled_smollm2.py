"""SmolLM2-135M with Gated DeltaNet: perplexity before and behind each stage of distillation, and a stream's memory.

    python -m benchmarks.training.distilled_smollm2 --teacher=FOLDER --runs=runs [--stages aligned]

Every other layer of SmolLM2-135M-Instruct gets a Gated DeltaNet beside a window of 32 tokens with 4 sinks (LoLCATs,
2410.10254; InfiniteVL, 2512.08829), and only these recurrent mixers are trained, on the built-in corpus: first each by
itself, to make with its window what the teacher's layer makes of the same input, then all of them end to end, for the
teacher's predictions. The recurrent mixers' output begins at zero, so the line `converted` is the windows alone. Each
model reads one held-out stream, the layers that attend through 4 sinks and a window of 252 tokens; `state` is what a
stream takes, in float32. The teacher reads it with all tokens, too, and through windows that take as many bytes as the
student. A run that was stopped goes on, and figures that are there are kept.
"""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import report
from streamjax.byte_units import human_bytes
from streamjax.data import DataConfig, make_eval_batches
from streamjax.models.conversion import convert_layers
from streamjax.streaming.state import empty_state
from streamjax.training import TrainConfig, apply_overrides, train

NAME = "training/distilled_smollm2"
ROOT = Path(__file__).parents[2]
CHUNK, SINKS, WINDOW = 256, 4, 252
LENGTHS = (8192, 65536)
LAYERS = tuple(range(1, 30, 2))
STAGES = ("aligned", "distilled")


def config_of(stage: str, options: argparse.Namespace) -> TrainConfig:
    config: TrainConfig = runpy.run_path(str(ROOT / "configs" / "distill.py"))["get_config"]()
    shared = {
        "name": "distilled_smollm2",
        "distill.teacher": options.teacher,
        "data.tokenizer": options.teacher,
        "data.seq_len": 256,
        "data.batch_size": 1,
        "distill.layers": ",".join(map(str, LAYERS)),
        "distill.recurrent.num_heads": 9,
        "distill.recurrent.num_groups": 9,
        "distill.window": 32,
        "distill.sinks": SINKS,
        "distill.trained": "recurrent",
        "eval_batches": 4,
        "eval_interval": 1000,
        "checkpoint_interval": 50,
        "keep_checkpoints": 1,
    }
    own = {
        "aligned": {"init_from": options.teacher, "steps": options.aligning},
        "distilled": {
            "init_from": options.runs / "aligned" / "model",
            "objective.matches": "predictions",
            "optimizer.learning_rate": "5e-4",
            "optimizer.warmup_steps": 3,
            "data.shuffle_seed": 1,
            "steps": options.teaching,
        },
    }[stage]
    return apply_overrides(config, [(name, str(value)) for name, value in {**shared, **own}.items()])


def models(options: argparse.Namespace) -> Iterator[tuple[str, int, sj.Decoder]]:
    """The teacher, the student at the start, and behind each stage that is done, with the tokens it has learnt from."""
    distill, tokens = config_of("aligned", options).distill, 0
    teacher = sj.load(options.teacher, jnp.float32)
    yield "teacher", 0, teacher
    mixers: Any = {"recurrent": distill.recurrent, "window": distill.window, "sinks": distill.sinks}
    yield "converted", 0, convert_layers(teacher, distill.layers, **mixers)
    for stage in STAGES:
        folder = options.runs / stage
        if (folder / "model").exists():
            made = json.loads((folder / "train_config.json").read_text())
            tokens += made["steps"] * made["data"]["seq_len"] * made["data"]["batch_size"]
            yield stage, tokens, sj.load(folder / "model", jnp.float32)


def windowed(window: int) -> Any:
    return sj.kv.preset("streaming_llm", sinks=SINKS, window=window)


def dense(length: int) -> Any:
    return sj.kv.preset("dense", capacity=length)


def state_bytes(model: sj.Decoder, cache: Any) -> int:
    state = jax.eval_shape(partial(empty_state, cache=cache), model)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def held_out(options: argparse.Namespace) -> np.ndarray:
    data = DataConfig(tokenizer=options.teacher, packing="streams", seq_len=CHUNK, batch_size=1)
    rows = [np.asarray(row["tokens"]) for row in make_eval_batches(data, options.tokens // CHUNK, split="test")]
    return np.concatenate(rows, axis=1)


def line(name: str, learnt: int, model: sj.Decoder, tokens: np.ndarray, window: int | None) -> dict[str, Any]:
    """Perplexity of a stream's tokens behind the first chunk, and what a stream takes; all tokens without a window."""
    cache = dense(tokens.shape[1]) if window is None else windowed(window)
    _, nats = sj.score(model, sj.init_state(model, cache), tokens, CHUNK)
    found: dict[str, Any] = {
        "model": name,
        "layers that attend keep": "all tokens" if window is None else f"{SINKS} + {window}",
        "tokens learnt from": f"{learnt:,}",
        "perplexity": float(np.exp(np.mean(np.asarray(nats)[0, CHUNK:], dtype=np.float64))),
    }
    for length in LENGTHS:
        kept = dense(length) if window is None else windowed(window)
        found[f"state, {length:,} tokens"] = human_bytes(state_bytes(model, kept))
    return found


def as_large(teacher: sj.Decoder, student: sj.Decoder) -> int:
    """The window with which the teacher's stream takes as many bytes as the student's."""
    wanted, one, two = state_bytes(student, windowed(WINDOW)), *(state_bytes(teacher, windowed(n)) for n in (64, 65))
    return 64 + round((wanted - one) / (two - one))


def measure(options: argparse.Namespace) -> None:
    """A line for each model that is there; those that were measured are not read again."""
    kept = options.runs / "measured.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    tokens, rows = held_out(options), []

    def add(name: str, learnt: int, model: sj.Decoder, window: int | None = WINDOW) -> None:
        at = f"{name}, window {window}, {learnt} tokens, stream of {tokens.shape[1]}"
        known[at] = known.get(at) or line(name, learnt, model, tokens, window)
        rows.append(known[at])
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(known, indent=1))

    for name, learnt, model in models(options):
        if name == "teacher":
            teacher = model
            add(name, learnt, model, None)
        if name == "converted":
            add("teacher, as many bytes", 0, teacher, as_large(teacher, model))
        add(name, learnt, model)
    report(NAME, rows, stream=tokens.shape[1], **({"note": options.note} if options.note else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a folder with SmolLM2-135M-Instruct and its tokenizer")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--aligning", type=int, default=150, help="steps of 256 tokens")
    parser.add_argument("--teaching", type=int, default=80, help="steps of 256 tokens")
    parser.add_argument("--tokens", type=int, default=2048, help="of the stream that is read")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES, help="those that are trained")
    parser.add_argument("--note", default="", help="what is said below the table")
    options = parser.parse_args()
    for stage in options.stages:
        train(config_of(stage, options), options.runs / stage)
        measure(options)
    measure(options)


if __name__ == "__main__":
    main()
