"""A Transformer turned into a hybrid: bits per byte before and behind each stage, and what a stream takes.

Trains configs/distill.py in its two stages, each layer by itself and then the student's predictions. Then the teacher,
the student as it begins, and the student behind each stage read one held-out stream, a hundred times as long as a row
of the training, through 4 sinks and a window of 508 in the layers that attend: bits per byte of its first and its last
quarter. Runs that are done are read, and those that were stopped go on; `--measure` reads what is there.

    python -m benchmarks.training.distillation --runs=runs [--measure] [--page]
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
import numpy as np

import streamjax as sj
from benchmarks.reporting import RESULTS, report, table
from benchmarks.tables import put
from streamjax.byte_units import human_bytes
from streamjax.data import make_eval_batches
from streamjax.models.conversion import convert_layers
from streamjax.training import TrainConfig, apply_overrides, train

NAME = "training/distillation"
ROOT = Path(__file__).parents[2]
CHUNK = 512
STAGES = {
    "aligned": (("eval_batches", "2"),),
    "distilled": (
        ("objective.matches", "predictions"),
        ("distill.trained", "all"),
        ("optimizer.learning_rate", "1e-3"),
        ("steps", "300"),
        ("eval_batches", "2"),
    ),
}


def config_of(stage: str, runs: Path) -> TrainConfig:
    config: TrainConfig = runpy.run_path(str(ROOT / "configs" / "distill.py"))["get_config"]()
    start = [] if stage == "aligned" else [("init_from", str(runs / "aligned" / "model"))]
    return apply_overrides(config, [*start, *STAGES[stage]])


def models(runs: Path) -> Iterator[tuple[str, int, sj.Decoder]]:
    """The teacher, the student at the start, and behind each stage that is done, with the tokens it has learnt from."""
    config = config_of("aligned", runs)
    teacher = sj.load(config.distill.teacher or "", jnp.float32)
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
    """What a stream's state takes with all tokens and with a window, and bits per byte of one held-out stream.

    Of its first quarter and of its last one, where a state that goes astray would tell.
    """
    data = dataclasses.replace(config.data, packing="streams", seq_len=CHUNK, batch_size=1)
    rows = list(make_eval_batches(data, length // CHUNK))
    window = sj.kv.preset("streaming_llm", sinks=4, window=508)
    states = {"all tokens": sj.kv.preset("dense", capacity=length), "sinks and window": window}
    found: dict[str, Any] = {
        f"state, {name}": sj.init_state(model, cache).cache_bytes for name, cache in states.items()
    }
    state, nats = sj.init_state(model, window), []
    for row in rows:
        state, cost = sj.score(model, state, np.asarray(row["tokens"]), CHUNK)
        nats.append(np.asarray(cost)[0])
    nats[0] = np.concatenate(([0.0], nats[0][1:]))  # nothing predicts the first byte
    first, last = np.concatenate(nats[: len(nats) // 4]), np.concatenate(nats[-(len(nats) // 4) :])
    return found | {
        name: float(np.mean(part) / np.log(2)) for name, part in (("first quarter", first), ("last quarter", last))
    }


def shown(rows: list[dict[str, Any]]) -> str:
    def cell(name: str, value: Any) -> str:
        if name.startswith("state"):
            return human_bytes(value)
        return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value

    return table([{name: cell(name, value) for name, value in row.items()} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--tokens", type=int, default=51_200, help="of the stream that is read")
    parser.add_argument("--measure", action="store_true", help="train nothing, and read what is there")
    parser.add_argument("--page", action="store_true", help="write the table into docs/training.md, too")
    options = parser.parse_args()
    if not options.measure:
        for stage in STAGES:
            train(config_of(stage, options.runs), options.runs / stage)
    config = config_of("aligned", options.runs)
    rows = [
        {"model": name, "tokens learnt from": tokens, **measured(config, model, options.tokens)}
        for name, tokens, model in models(options.runs)
    ]
    report(NAME, rows, stream=options.tokens)
    result = json.loads((RESULTS / f"{NAME}.json").read_text())
    machine = result["machine"]
    where = f"*{machine['cpu']}, {machine['cores']} cores, JAX {machine['jax']}; a stream of {options.tokens:,} tokens*"
    if options.page:
        put(ROOT / "docs" / "training.md", NAME, f"{shown(result['rows'])}\n\n{where}")


if __name__ == "__main__":
    main()
