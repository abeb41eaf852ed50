"""Simulated time of a step whose sequences have mixed lengths: groups of devices chosen for it, and groups of one size.

The lengths are those of the built-in corpus, CPython's standard library in bytes: the median file has 8,000, the
longest 229,202. A step has 256 files, drawn. The costs are those of Llama-3.1-8B on 64 GPUs in machines of 8: 400
TFLOP/s, 300 GB/s within a machine and 40 GB/s between them, 16,384 tokens a device. `planned in` are CPU seconds; a run
plans beside the step before. `none` is the time in which all devices are always busy and wait for nothing. The
gradients of such groups are tested on eight virtual devices.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks.model_shapes import PUBLISHED
from benchmarks.reporting import report
from streamjax.data.sources import open_source
from streamjax.models.families import read_config
from streamjax.training.sequence_groups.costs import GroupCosts
from streamjax.training.sequence_groups.planning import fixed_groups, plan_groups

DEVICES, FILES = 64, 256


def corpus_lengths() -> np.ndarray:
    source = open_source("builtin", "train")
    return np.array([len(source[i].encode()) for i in range(len(source))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args().steps
    config = read_config(PUBLISHED["llama-3.1-8b"])
    costs = GroupCosts.of_model(
        config, flops=4e14, bandwidth=3e11, far_bandwidth=4e10, near=8, turn=2e-3, tokens_per_device=16_384
    )
    every, rng = corpus_lengths(), np.random.default_rng(0)
    rows: dict[str, list[float]] = {}
    for _ in range(steps):
        lengths = [int(n) for n in rng.choice(every, FILES) if n]
        begin = time.process_time()
        plan = plan_groups(lengths, DEVICES, costs)
        rows.setdefault("planned in", []).append(time.process_time() - begin)
        rows.setdefault("planned", []).append(plan.seconds)
        for degree in (16, 32, 64):  # the longest file does not fit into 8
            fixed = fixed_groups(lengths, DEVICES, degree, costs)
            rows.setdefault(f"groups of {degree}", []).append(fixed.seconds)
        rows.setdefault("none", []).append(sum(costs.sequence(n, 1) for n in lengths) / DEVICES)
    mean = {name: float(np.mean(values)) for name, values in rows.items()}
    best = min(value for name, value in mean.items() if name.startswith("groups"))
    planned_in = mean.pop("planned in")
    table = [
        {
            "groups": name,
            "seconds a step": round(value, 2),
            "of the best fixed size": round(value / best, 3),
            "planned in": f"{planned_in:.1f}" if name == "planned" else "",
        }
        for name, value in mean.items()
    ]
    report("training/sequence_groups", table)


if __name__ == "__main__":
    main()
