"""SFT, DPO and GRPO on a small chat model: what each run changes, on held-out questions.

Trains configs/sft.py, configs/dpo.py and configs/grpo.py on data that is made here, and measures the model before and
behind: the share of answers in JSON (SFT), by how much the short answers gained on the wordy ones (DPO), and the reward
(GRPO). Runs that are done are read, and those that were stopped go on.

    python -m benchmarks.training.post_training --model=SmolLM2-135M-Instruct --runs=runs [--page]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import RESULTS, report, table
from benchmarks.tables import put
from benchmarks.training import post_training_data
from streamjax.data.conversations.prepared import prepare_examples
from streamjax.training import RolloutConfig, TrainConfig, apply_overrides, train
from streamjax.training.post_training.rollouts import Rollouts
from streamjax.training.run.feeds import make_feed

NAME = "training/post_training"
ROOT = Path(__file__).parents[2]
IN_JSON = r'regex:^\{"answer": "[^"]*"\}$'
ANSWER_TOKENS = 24


def config_of(kind: str, model: str, runs: Path) -> TrainConfig:
    config: TrainConfig = runpy.run_path(str(ROOT / "configs" / f"{kind}.py"))["get_config"]()
    changes = {"init_from": model, "data.tokenizer": model, "data.source": str(runs / "data" / kind)}
    return apply_overrides(config, changes.items())


def answers(model: sj.Decoder, config: TrainConfig) -> Any:
    """The likeliest answers to the held-out questions of a run, rewarded for being in JSON."""
    prompts = dataclasses.replace(config.data, format="prompts", packing="rows", truncation="drop", seq_len=80)
    prompts = dataclasses.replace(prompts, source=str(Path(config.data.source).parent / "dpo"))
    tokenizer = sj.load_tokenizer(config.data.tokenizer)
    examples = prepare_examples(prompts, "validation", room=ANSWER_TOKENS, tokenizer=tokenizer)
    settings = RolloutConfig(rewards=(IN_JSON,), max_new_tokens=ANSWER_TOKENS, group_size=2)
    ids = [text.ids for [text] in examples.texts]
    return Rollouts(settings, tokenizer, prompts.seq_len).answer(model, ids, examples.values, None)


def behaviour(kind: str, folder: str | Path, config: TrainConfig) -> dict[str, float]:
    """What a run of this kind is to change, besides what its evaluation says, of the model in a folder."""
    if kind != "sft":
        return {}
    return {"answers in JSON": float(np.mean(answers(sj.load(folder, jnp.float32), config).total))}


def measure(kind: str, model: str, runs: Path) -> list[dict[str, Any]]:
    """A row for each evaluation of a run, the first of the model before it."""
    config, workdir = config_of(kind, model, runs), runs / kind
    train(config, workdir)
    start = sj.load(model, jnp.float32)
    feed_config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0))
    feed = make_feed(feed_config, sj.load_tokenizer(model), start, None, workdir)
    rows = [{"run": kind, "step": 0, **feed.evaluate(start), **behaviour(kind, model, config)}]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows += [{"run": kind, **line} for line in lines if any(name.startswith("eval_") for name in line)]
    rows[-1] |= behaviour(kind, workdir / "model", config)
    if kind == "grpo":
        sampled = {line["step"]: line["reward"] for line in lines if "reward" in line}
        for row in rows:  # the mean of the two lines at the step and before it; at the start the first line
            known = [
                reward for step, reward in sorted(sampled.items()) if step <= max(row["step"], config.log_interval)
            ]
            row["reward"] = float(np.mean(known[-2:]))
    return rows


COLUMNS = {
    "sft": ("eval_loss", "answers in JSON"),
    "dpo": ("eval_loss", "eval_margin", "eval_accuracy"),
    "grpo": ("reward", "eval_reward"),
}
TITLES = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each run."""
    parts = []
    for kind, columns in COLUMNS.items():
        shown = [
            {"step": row["step"], **{name: _number(row.get(name)) for name in columns}}
            for row in rows
            if row["run"] == kind
        ]
        parts.append(f"{TITLES[kind]} (`configs/{kind}.py`):\n\n{table(shown)}")
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/SmolLM2-135M-Instruct")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--page", action="store_true", help="write the tables of the last report into docs/training.md")
    options = parser.parse_args()
    if not options.page:
        post_training_data.write(options.runs / "data")
        rows = [row for kind in COLUMNS for row in measure(kind, options.model, options.runs)]
        names = list(dict.fromkeys(name for row in rows for name in row))
        report(NAME, [{name: row.get(name) for name in names} for row in rows])
    result = json.loads((RESULTS / f"{NAME}.json").read_text())
    machine = result["machine"]
    where = f"*{machine['cpu']}, {machine['cores']} cores, JAX {machine['jax']}*"
    put(ROOT / "docs" / "training.md", NAME, f"{tables(result['rows'])}\n\n{where}")


if __name__ == "__main__":
    main()
