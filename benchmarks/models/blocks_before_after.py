"""Speed and compile time of models as lists of blocks, beside those of the flat `ModelConfig` before them.

    git worktree add ../before 1860c407^; git worktree add ../blocks 1860c407
    python -m benchmarks.models.blocks_before_after --before ../before --blocks ../blocks    # half an hour

Commit 1860c407 made a model a list of blocks, each of a mixer and an MLP with configurations of their own. `before` is
its parent, `blocks` that commit, `today` this checkout. Every side reads the same two folders with drawn float32
weights: SmolLM2-135M's shape and that of the shipped `stdlib_byte` model, 4 layers of 256 channels. A process does one
thing with one model of one side, and ends; the sides take turns. `read` is 1,024 tokens into a cache of 4 sinks and a
window of 1,020, `decode` 32 tokens behind them, `step` the loss and its gradient of 512 tokens with layers stacked,
which keeps the inputs of layers (`remat`).

The lowered programs of a step of training and of decoding are the same text in `blocks` as in `before`: what differs
there is the machine's noise. A step of `today` has a fourth more to compile and takes less to run: with SmolLM2's shape
that is made up for by the second step, with the small model by the fifteenth. Since f08cd9c2 rows of 512 tokens and
more attend block by block on CPUs, in loops of their own, which is the likely cause of both.

Figures are CPU seconds of all threads, which other work on the machine disturbs less than wall time. `compile` is what
the first run takes above later ones: tracing, lowering and XLA. `run` is the median of later ones, in the median
process. The ratios are medians over rounds, by the time of `before` in the same round: above 1 is slower than it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("read", "decode", "step")
READ, NEW, TRAINED = 1024, 32, 512


def phase_of(phase: str, folder: str) -> Callable[[], Any]:
    """What a process times, of what every side has: `sj.load`, `read`, `generate` and `loss_and_grad`."""
    import jax
    import numpy as np

    import streamjax as sj

    model = jax.block_until_ready(sj.load(folder, dtype="float32", scan_layers=phase == "step"))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, READ)).astype(np.int32)
    if phase == "step":
        targets, weights = tokens[:, 1 : TRAINED + 1], np.ones((1, TRAINED), np.float32)
        batch = jax.device_put({"tokens": tokens[:, :TRAINED], "targets": targets, "weights": weights})
        step = jax.jit(lambda model, batch: sj.training.loss_and_grad(model, batch, "remat"))
        return lambda: jax.block_until_ready(step(model, batch))
    cache, greedy = sj.kv.preset("streaming_llm", sinks=4, window=READ - 4), sj.Sampler(temperature=0)
    if phase == "read":
        return lambda: jax.block_until_ready(sj.read(model, sj.init_state(model, cache), tokens))
    standing = [sj.read(model, sj.init_state(model, cache), tokens)]

    def decode() -> None:
        nothing = np.zeros((1, 0), np.int32)
        standing[0], out = sj.generate(model, standing[0], nothing, max_new_tokens=NEW, sampler=greedy)
        jax.block_until_ready((standing[0], out))

    return decode


def measure(phase: str, folder: str, turns: int) -> dict[str, float]:
    """CPU seconds of the first run above later ones, and of a later one."""
    run, times = phase_of(phase, folder), []
    for _ in range(turns + 1):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    later = statistics.median(times[1:])
    return {"compile": times[0] - later, "run": later}


def on_side(checkout: Path, *arguments: Any) -> dict[str, float]:
    """`measure` in a process of its own, by the library of a checkout; this file is the only other thing it reads."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--child", *map(str, arguments)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{checkout}, {arguments}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if Path(found.pop("library")).resolve() != (checkout / "streamjax/__init__.py").resolve():
        raise RuntimeError(f"{checkout}: the process has found another library")
    return found


def rows_of(found: dict[tuple[str, str, str], list[dict[str, float]]], sides: list[str]) -> list[dict[str, Any]]:
    """A line a model, phase and side."""
    rows = []
    for (model, phase, side), runs in found.items():
        row: dict[str, Any] = {"model": model, "what": phase, "side": side}
        for kind in ("compile", "run"):
            row[f"{kind}, CPU s"] = statistics.median(run[kind] for run in runs)
        for kind in ("compile", "run"):
            first = found[model, phase, sides[0]]
            row[f"{kind}, by before"] = statistics.median(
                run[kind] / old[kind] for run, old in zip(runs, first, strict=True)
            )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the parent of 1860c407")
    parser.add_argument("--blocks", type=Path, help="one of 1860c407 itself; without it that side is left out")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind; the median counts")
    parser.add_argument("--turns", type=int, default=5, help="runs of a process behind its first")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--output", type=Path, help="where the JSON goes, if not to the results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        found = measure(*arguments.child, arguments.turns)
        import streamjax

        print(json.dumps({**found, "library": streamjax.__file__}))
        return
    if arguments.before is None:
        parser.error("--before is missing: the folder of a checkout of 1860c407^")
    from benchmarks.models.drawn import SMOLLM2, STDLIB_BYTE, write_drawn
    from benchmarks.reporting import report

    sides = {"before": arguments.before, "blocks": arguments.blocks, "today": ROOT}
    sides = {name: path for name, path in sides.items() if path is not None}
    models = {"SmolLM2-135M": SMOLLM2, "stdlib_byte": STDLIB_BYTE}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: write_drawn(values, str(Path(temporary) / name)) for name, values in models.items()}
        cases = list(itertools.product(models, arguments.phases, sides))
        runs: dict[tuple[str, str, str], list[dict[str, float]]] = {case: [] for case in cases}
        for turn, (model, phase, side) in itertools.product(range(arguments.rounds), cases):
            common = "--turns", arguments.turns
            runs[model, phase, side].append(on_side(sides[side].resolve(), phase, folders[model], *common))
            last = runs[model, phase, side][-1]
            print(f"round {turn + 1} of {arguments.rounds}, {model}, {phase}, {side}: {last}", flush=True)
    settings = {"rounds": arguments.rounds, "turns": arguments.turns}
    report("models/blocks_before_after", rows_of(runs, list(sides)), arguments.output, **settings)


if __name__ == "__main__":
    main()
