"""A step of SFT and of DPO against TRL on torch CPU: loss, gradient norm, seconds and peak memory.

The weights and tokens are the same, and each side is in a process of its own.

    python -m benchmarks.training.versus_trl --model FOLDER --python TRL/bin/python       # an hour on 2 quiet cores
    python -m benchmarks.training.versus_trl --model FOLDER --python TRL/bin/python --lengths 256 --turns 1 --output J

The file of results is written behind every side, and a run that was ended goes on behind what is in it.

`TRL/bin/python` is a Python with `pip install trl peft torch==2.13.0`; FOLDER has a model in Hugging Face's layout,
such as SmolLM2-135M. A batch has 2,048 or 8,192 tokens: one row for SFT, of which all tokens count, and two for DPO, of
which the second half counts, with given log-probabilities of the reference. Both train all weights in float32 by AdamW
with gradients clipped to 1. TRL runs its trainers with what is their default: gradient checkpointing, a loss head that
makes no whole logits, sdpa attention. streamjax runs its orders "remat" (the same idea) and "layer", in chunks of 1,024
tokens, over stacked layers; both keep what attention found (`keep_attention`).

`loss` and `norm` are those of the first step, before clipping; `off by` their largest relative difference from TRL's.
CPU seconds are of all threads, the median of the steps behind the first one, which compiles. `peak MB` is the highest
resident memory of the process, libraries and all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reporting import Record, in_own_process

MODULE, RESULT = "benchmarks.training.versus_trl", "training/versus_trl"
TASKS = ("sft", "dpo")
RATE, CLIP, CHUNK = 1e-5, 1.0, 1024
OURS: dict[str, dict[str, Any]] = {
    "remat": {"method": "remat", "keep_attention": True},
    "layer": {"method": "layer", "keep_attention": True, "chunk_size": CHUNK},
}
REFERENCE = -10.0  # nats a token that the reference gives to both answers


def rows_of(task: str, length: int, vocab_size: int) -> np.ndarray:
    """Token ids of a batch, all rows together `length` long. Rows of a pair begin alike."""
    draw = np.random.default_rng(0)
    count = 1 if task == "sft" else 2
    rows = draw.integers(3, vocab_size, (count, length // count)).astype(np.int32)
    rows[:, : rows.shape[1] // 2] = rows[0, : rows.shape[1] // 2]
    return rows


def reference_of(rows: np.ndarray) -> list[float]:
    """What the reference gives to the answers of a pair."""
    return [rows.shape[1] // 2 * REFERENCE] * 2


class Clock:
    """CPU and wall seconds of steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def start(self) -> None:
        self._since = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        self.steps.append((time.process_time() - self._since[0], time.perf_counter() - self._since[1]))

    def result(self, loss: float, norm: float) -> dict[str, float]:
        cpu, wall = (statistics.median(values) for values in zip(*self.steps[1:], strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        return {"loss": loss, "norm": norm, "CPU s": cpu, "seconds": wall, "peak MB": peak}


def trl_steps(task: str, length: int, folder: str, turns: int) -> dict[str, float]:
    """TRL's trainer; this runs in a Python that has it."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows, clock = rows_of(task, length, model.config.vocab_size), Clock()

    class Timing(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

    with tempfile.TemporaryDirectory() as output:
        options = {
            "output_dir": output, "use_cpu": True, "bf16": False, "max_steps": turns + 1, "learning_rate": RATE,
            "lr_scheduler_type": "constant", "per_device_train_batch_size": 1, "max_grad_norm": CLIP,
            "weight_decay": 0.0, "max_length": None, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        if task == "sft":
            data = Dataset.from_list([{"input_ids": rows[0].tolist()}] * (turns + 1))
            made: Any = trl.SFTTrainer(
                model, trl.SFTConfig(**options), train_dataset=data, processing_class=tokenizer, callbacks=[Timing()]
            )
        else:
            half = rows.shape[1] // 2
            chosen, rejected = reference_of(rows)
            pair = {"prompt_ids": rows[0, :half].tolist(), "chosen_ids": rows[0, half:].tolist()}
            pair |= {
                "rejected_ids": rows[1, half:].tolist(),
                "ref_chosen_logps": chosen,
                "ref_rejected_logps": rejected,
            }
            data = Dataset.from_list([pair] * (turns + 1))
            # The reference comes with the data, as if it had been computed before.
            made = _with_given_reference(trl.DPOTrainer)(
                model, None, trl.DPOConfig(**options, precompute_ref_log_probs=True), train_dataset=data,
                processing_class=tokenizer, callbacks=[Timing()],
            )  # fmt: skip
        made.train()
    first: dict[str, Any] = made.state.log_history[0]
    return clock.result(first["loss"], first["grad_norm"])


def _with_given_reference(trainer: Any) -> Any:
    """DPOTrainer that takes tokens and the reference's log-probabilities from the data set."""

    class Given(trainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return Given


def our_steps(task: str, length: int, folder: str, turns: int, side: str) -> dict[str, float]:
    """streamjax's training step."""
    import jax
    import jax.numpy as jnp

    import streamjax as sj
    from streamjax.training import DPO, CrossEntropy, OptimizerConfig, make_optimizer, make_train_step, new_state

    model = sj.load(folder, dtype=jnp.float32, scan_layers=True)
    rows, clock = rows_of(task, length, model.config.vocab_size), Clock()
    weights = np.ones(rows.shape, np.float32)
    weights[:, -1] = 0  # nothing follows
    batch = {"tokens": rows, "targets": np.roll(rows, -1, axis=1), "weights": weights}
    if task == "dpo":
        weights[:, : rows.shape[1] // 2 - 1] = 0
        batch["reference_logp"] = np.asarray(reference_of(rows), np.float32)
    optimizer = make_optimizer(
        OptimizerConfig(RATE, final_fraction=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=CLIP), turns + 1
    )
    options = OURS[side]
    if "chunk_size" in options:
        options = options | {"chunk_size": min(CHUNK, rows.shape[1])}
    step: Callable = make_train_step(optimizer, objective=DPO() if task == "dpo" else CrossEntropy(), **options)
    state, found = new_state(model, optimizer), []
    del model
    for _ in range(turns + 1):
        clock.start()
        state, metrics = step(state, batch)
        found.append(jax.device_get(metrics))
        clock.stop()
    return clock.result(float(found[0]["loss"]), float(found[0]["grad_norm"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in Hugging Face's layout")
    parser.add_argument("--python", required=True, help="a Python with trl")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], help="tokens of a batch")
    parser.add_argument("--turns", type=int, default=3, help="steps behind the first one; the median counts")
    parser.add_argument("--output", type=Path, help=f"of results; results/{RESULT}.json if not given")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, task, length = arguments.child
        known = (task, int(length), arguments.model, arguments.turns)
        print(json.dumps(trl_steps(*known) if side == "trl" else our_steps(*known, side)))
        return
    versions: dict[str, Any] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    record = Record(RESULT, arguments.output, **versions)
    for length, task in itertools.product(arguments.lengths, TASKS):
        for side in ("trl", *OURS):
            key = {"tokens": length, "task": task, "steps": arguments.turns}
            if record.has(side=side, **key):
                continue
            python = arguments.python if side == "trl" else sys.executable
            given = ["--model", arguments.model, "--python", arguments.python, "--turns", arguments.turns]
            found = in_own_process(MODULE, *given, "--child", side, task, length, python=python)
            peers = (row for row in record.rows if row.items() >= {**key, "side": "trl"}.items())
            peer = next(peers, found)
            off = max(abs(found[name] / peer[name] - 1) for name in ("loss", "norm"))
            record.add({**key, "side": side, **found, "off by": off})
    record.finish()


if __name__ == "__main__":
    main()
