"""Simulated time of a step whose sequences have mixed lengths: groups of devices chosen for it, and groups of one size.

The costs are those of Llama-3.1-8B on 64 GPUs in machines of 8: 400 TFLOP/s, 300 GB/s within a machine and 40 GB/s
between them, 16,384 tokens a device. `alone` is the time in which all devices are always busy and wait for nothing.
`planned in` are CPU seconds a step; a run plans beside the step before. One size serves all steps of a row, so it must
hold the longest sequence of the data. The gradients of such groups are tested on eight virtual devices.

`Wikipedia`, `LMsysChat1M` and `ChatQA2-Long-SFT` have the shares of lengths that Skrull publishes (2505.19609, Table 1:
below 1K, 4K, 8K, 32K and 128K tokens, and the longest). A step has 512 sequences, drawn. The table says nothing of
lengths between two of its limits: they are drawn with equal shares for equal ratios, the shortest 32 tokens. 0.01% of
LMsysChat1M are above 128K, up to 1,643K, which 64 such GPUs cannot hold: these are cut to 128K. `standard library` is
the built-in corpus, CPython's files in bytes: the median has 8,000, the longest 229,202; a step has 256 files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.model_shapes import PUBLISHED
from benchmarks.reporting import report
from streamjax.data.sources import open_source
from streamjax.models.families import read_config
from streamjax.training.sequence_groups.costs import GroupCosts
from streamjax.training.sequence_groups.planning import fixed_groups, plan_groups

DEVICES, FILES, SEQUENCES = 64, 256, 512
K, SHORTEST, CONTEXT = 1024, 32, 128 * 1024
LIMITS = (1 * K, 4 * K, 8 * K, 32 * K, 128 * K)
# Skrull, 2505.19609, Table 1: the share of sequences below each limit, and the longest.
SKRULL = {
    "Wikipedia": ((0.8788, 0.9934, 0.9992, 0.9999, 1.0), 78 * K),
    "LMsysChat1M": ((0.8712, 0.9935, 0.9987, 0.9998, 0.9999), 1643 * K),
    "ChatQA2-Long-SFT": ((0.2192, 0.3148, 0.4043, 0.9986, 1.0), 99 * K),
}


def published_lengths(name: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths with the shares of a row of Skrull's table; within two limits their logarithms are uniform. [count]"""
    shares, longest = SKRULL[name]
    logs = np.log([SHORTEST, *(min(limit, longest) for limit in LIMITS), longest])
    lengths = np.exp(np.interp(rng.random(count), [0.0, *shares, 1.0], logs))
    return np.minimum(lengths.astype(int), CONTEXT)


def corpus_lengths() -> np.ndarray:
    source = open_source("builtin", "train")
    return np.array([len(source[i].encode()) for i in range(len(source))])


def compared(steps: Sequence[Sequence[int]], longest: int, costs: GroupCosts) -> list[dict[str, Any]]:
    """Rows of these steps: planned groups, groups of each size that holds the longest sequence, devices never idle."""
    found: dict[str, list[float]] = {}
    planned_in = 0.0
    for lengths in steps:
        begin = time.process_time()
        found.setdefault("planned", []).append(plan_groups(lengths, DEVICES, costs).seconds)
        planned_in += (time.process_time() - begin) / len(steps)
        degree = 1
        while degree <= DEVICES:
            if longest <= degree * costs.tokens_per_device:
                fixed = fixed_groups(lengths, DEVICES, degree, costs)
                found.setdefault(f"groups of {degree}", []).append(fixed.seconds)
            degree *= 2
        found.setdefault("alone", []).append(sum(costs.sequence(n, 1) for n in lengths) / DEVICES)
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    best = min(value for name, value in mean.items() if name.startswith("groups"))
    return [
        {
            "groups": name,
            "seconds a step": float(f"{value:.4g}"),
            "of the best fixed size": round(value / best, 3),
            "planned in": f"{planned_in:.1f}" if name == "planned" else "",
        }
        for name, value in mean.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="of the built-in corpus; others have eight times as many")
    steps = parser.parse_args().steps
    config = read_config(PUBLISHED["llama-3.1-8b"])
    costs = GroupCosts.of_model(
        config, flops=4e14, bandwidth=3e11, far_bandwidth=4e10, near=8, turn=2e-3, tokens_per_device=16_384
    )
    table = []
    for name, (_, longest) in SKRULL.items():
        rng = np.random.default_rng(0)
        drawn = [published_lengths(name, SEQUENCES, rng).tolist() for _ in range(8 * steps)]
        table += [{"lengths": name, **row} for row in compared(drawn, min(longest, CONTEXT), costs)]
    every, rng = corpus_lengths(), np.random.default_rng(0)
    drawn = [[int(n) for n in rng.choice(every, FILES) if n] for _ in range(steps)]
    table += [{"lengths": "standard library", **row} for row in compared(drawn, int(every.max()), costs)]
    report("training/sequence_groups", table)


if __name__ == "__main__":
    main()
