"""LeMo: fine-tuning where layers compute a share of their tokens, beside layers that compute all.

    python -m benchmarks.training.lemo --model FOLDER                # FOLDER: SmolLM2-135M; an hour on 2 quiet cores
    python -m benchmarks.training.lemo --model FOLDER --steps 24 --length 512 --rows 1

The file of results is written behind every run, and one that was ended goes on.

Runs of adapters of rank 16 on the built-in corpus, which differ in their share alone, each in a process of its own.
`loss` and `eval loss` are nats a token, the first the mean over the last quarter of the steps, the second at the end
with all tokens; `CPU s` is of all threads, the median of the steps behind the second. `found`: of the blocks that a
layer would compute by their true scores, the share that its predictor names. `random` computes drawn blocks instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reporting import Record, in_own_process

MODULE = "benchmarks.training.lemo"
SHARES = (1.0, 0.7, 0.5)
SETTINGS = ("steps", "length", "rows", "block")


def one_run(model: str, share: float, steps: int, length: int, rows: int, block: int, kind: str) -> dict[str, Any]:
    """A run in this process; its figures."""
    from streamjax.data import DataConfig
    from streamjax.training import LeMoConfig, LoRAConfig, OptimizerConfig, TrainConfig, train
    from streamjax.training.elimination import kept_tokens, learning
    from streamjax.training.run.loop import _Run

    seconds: list[float] = []
    told: list[float] = []
    advance, learn = _Run.advance, learning.PredictorTraining._step

    def timed(run: _Run) -> None:
        import jax

        start = time.process_time()
        advance(run)
        jax.block_until_ready(run.state)
        seconds.append(time.process_time() - start)

    def listened(training: Any, batch: Any) -> Any:
        step = learn(training, batch)
        told.append(step.found)
        return step

    _Run.advance, learning.PredictorTraining._step = timed, listened  # type: ignore[method-assign]
    if kind == "random":
        _keep_at_random(kept_tokens)
    config = TrainConfig(
        name="lemo",
        model=None,
        init_from=model,
        data=DataConfig(seq_len=length, batch_size=rows, tokenizer=model),
        steps=steps,
        optimizer=OptimizerConfig(5e-4, final_fraction=0.1, warmup_steps=5, weight_decay=0.0),
        lora=LoRAConfig(16, targets=("q", "k", "v", "o", "gate", "up", "down")),
        lemo=LeMoConfig(share, block=block, equal=kind != "thresholds", steps=20, updates=10),
        scan_layers=True,
        log_interval=1,
        eval_interval=steps,
        eval_batches=8,
        checkpoint_interval=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(config, folder, progress=False)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    last = losses[-max(1, steps // 4) :]
    return {
        "first loss": losses[0],
        "loss": statistics.mean(last),
        "eval loss": next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line),
        "CPU s": statistics.median(seconds[2:]),
        "found": statistics.mean(told[-5:]) if told else None,
    }


def _keep_at_random(kept_tokens: Any) -> None:
    """Blocks by numbers that depend on the scores' bits alone, and so are drawn anew in each layer and row."""
    import jax
    import jax.numpy as jnp

    chosen = kept_tokens.highest

    def drawn(scores: Any, count: int) -> Any:
        seed = jnp.sum(jax.lax.bitcast_convert_type(scores, jnp.uint32))
        return chosen(jax.random.uniform(jax.random.key(seed), scores.shape), count)

    kept_tokens.highest = drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in Hugging Face's layout")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=2, help="of a batch")
    parser.add_argument("--block", type=int, default=32, help="tokens of a block")
    parser.add_argument("--kinds", nargs="+", default=["equal", "random"], choices=["equal", "thresholds", "random"])
    parser.add_argument("--output", type=Path, help="of results; results/training/lemo.json if not given")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        share, kind = arguments.child
        known = arguments.steps, arguments.length, arguments.rows, arguments.block
        print(json.dumps(one_run(arguments.model, float(share), *known, kind)))
        return
    record = Record("training/lemo", arguments.output, **{f"of {name}": getattr(arguments, name) for name in SETTINGS})
    for share, kind in [(1.0, "all"), *itertools.product(SHARES[1:], arguments.kinds)]:
        if not record.has(share=share, kept=kind):
            known = [part for name in ("model", *SETTINGS) for part in (f"--{name}", getattr(arguments, name))]
            found = in_own_process(MODULE, *known, "--child", share, kind)
            record.add({"share": share, "kept": kind, **found})
    record.finish()


if __name__ == "__main__":
    main()
