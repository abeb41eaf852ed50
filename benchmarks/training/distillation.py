"""A Transformer turned into a hybrid: perplexity before and behind each stage, and what a stream takes.

Trains configs/distill.py in its two stages, each layer by itself and then the student's predictions, and reads one
held-out stream with the teacher, the student as it begins, and the student behind each stage: with a cache that keeps
all, and with sinks and a window in the layers that still attend. Runs that are done are read, and those that were
stopped go on; `--measure` reads what is there.

    python -m benchmarks.training.distillation --model=SmolLM2-135M-Instruct --runs=runs [--measure]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import streamjax as sj
from benchmarks.reporting import RESULTS, report, table
from benchmarks.tables import put
from streamjax.data import make_eval_batches
from streamjax.evaluation.memory import human_bytes
from streamjax.models.conversion import convert_layers
from streamjax.training import BackpropConfig, TrainConfig, apply_overrides, evaluate, train

NAME = "training/distillation"
ROOT = Path(__file__).parents[2]
CAPACITY = 8192  # SmolLM2's own length
CACHES = {"all tokens": f"dense:capacity={CAPACITY}", "sinks and 508": "streaming_llm:sinks=4,window=508"}
CHUNK = 512
STAGES = {
    "aligned": (("steps", "160"),),
    "distilled": (
        ("objective.matches", "predictions"),
        ("distill.trained", "all"),
        ("backprop.method", "remat"),
        ("optimizer.learning_rate", "3e-4"),
        ("steps", "40"),
        ("checkpoint_interval", "5"),
    ),
}


def config_of(stage: str, model: str, runs: Path) -> TrainConfig:
    config: TrainConfig = runpy.run_path(str(ROOT / "configs" / "distill.py"))["get_config"]()
    start = model if stage == "aligned" else str(runs / "aligned" / "model")
    changes = [("init_from", start), ("distill.teacher", model), ("data.tokenizer", model)]
    return apply_overrides(config, [*changes, *STAGES[stage]])


def models(model: str, runs: Path) -> Iterator[tuple[str, int, sj.Decoder]]:
    """The teacher, the student at the start, and behind each stage that is done, with the tokens it has learnt from."""
    config = config_of("aligned", model, runs)
    teacher = sj.load(model, jnp.float32)
    yield "teacher", 0, teacher
    distill, tokens = config.distill, 0
    yield "converted", 0, convert_layers(teacher, distill.layers, recurrent=distill.recurrent, window=distill.window)
    for stage in STAGES:
        folder = runs / stage / "model"
        if folder.exists():
            made = json.loads((runs / stage / "train_config.json").read_text())
            tokens += made["steps"] * made["data"]["seq_len"] * made["data"]["batch_size"]
            yield stage, tokens, sj.load(folder, jnp.float32)


def measured(config: TrainConfig, model: sj.Decoder, length: int) -> dict[str, Any]:
    """Perplexity of one held-out stream under both caches, and the bytes of its state."""
    data = dataclasses.replace(config.data, packing="streams", seq_len=CHUNK, batch_size=1)
    found: dict[str, Any] = {}
    for name, cache in CACHES.items():
        state = sj.init_state(model, BackpropConfig(cache=cache).built_cache())
        found[f"bytes, {name}"] = state.cache_bytes
        batches = make_eval_batches(data, length // CHUNK)
        values = evaluate(model, batches, stream=state, chunk_size=CHUNK)
        found[f"perplexity, {name}"] = values["eval_perplexity"]
    return found


def shown(rows: list[dict[str, Any]]) -> str:
    def cell(name: str, value: Any) -> str:
        if name.startswith("bytes"):
            return human_bytes(value)
        return f"{value:.1f}" if name.startswith("perplexity") else f"{value:,}" if isinstance(value, int) else value

    return table([{name: cell(name, value) for name, value in row.items()} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/SmolLM2-135M-Instruct")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--tokens", type=int, default=4096, help="of the stream that is read")
    parser.add_argument("--measure", action="store_true", help="train nothing, and read what is there")
    options = parser.parse_args()
    if not options.measure:
        for stage in STAGES:
            train(config_of(stage, options.model, options.runs), options.runs / stage)
    config = config_of("aligned", options.model, options.runs)
    rows = [
        {"model": name, "tokens learnt from": tokens, **measured(config, model, options.tokens)}
        for name, tokens, model in models(options.model, options.runs)
    ]
    report(NAME, rows, stream=options.tokens)
    result = json.loads((RESULTS / f"{NAME}.json").read_text())
    machine = result["machine"]
    where = f"*{machine['cpu']}, {machine['cores']} cores, JAX {machine['jax']}; a stream of {options.tokens:,} tokens*"
    put(ROOT / "docs" / "training.md", NAME, f"{shown(result['rows'])}\n\n{where}")


if __name__ == "__main__":
    main()
