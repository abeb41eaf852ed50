"""Time of one gradient step by what backprop keeps, on this machine, all methods in one process and in turn.

    python -m benchmarks.backprop.step_time                       # 8,192 tokens; half an hour on 2 cores
    python -m benchmarks.backprop.step_time --length 2048 --repeats 5

A Qwen2-shaped model of about 50 million parameters in float32 (width 512, 8 layers, 8 query and 2 key heads, MLP 1,408,
32,000 tokens). The baseline, `full-logits`, is gradient checkpointing a layer with the logits of the whole sequence.
Ratios are medians over turns of a method's CPU seconds (of all threads) by the baseline's in the same turn: on a
machine with other work the seconds on the clock say little. Memory is the compiler's figure for temporaries.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import streamjax as sj
from benchmarks.reporting import median_ratio, report

CONFIG = sj.UniformConfig(
    vocab_size=32000,
    d_model=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=1408,
    qkv_bias=True,
)
BASELINE = "full-logits"


def methods(length: int) -> Mapping[str, Mapping[str, Any]]:
    """Arguments of `loss_and_grad`."""
    return {
        BASELINE: {"method": "remat", "logits_chunk": length},
        "remat": {"method": "remat"},
        "layer": {"method": "layer", "chunk_size": min(1024, length)},
        "layer, segment 4": {"method": "layer", "chunk_size": min(1024, length), "segment": 4},
        "chunk": {"method": "chunk", "chunk_size": min(1024, length)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sequence")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument(
        "--methods", nargs="+", choices=methods(1), default=list(methods(1)), help="beside the baseline"
    )
    parser.add_argument("--output", type=Path, help="where the JSON goes; benchmarks/results by default")
    options = parser.parse_args()
    model = jax.jit(lambda key: sj.Decoder(CONFIG, key, scan_layers=True))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, options.length + 1)).astype(np.int32)
    weights = np.ones((1, options.length), np.float32)
    batch = jax.device_put({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    programs, cpu, clock = {}, {}, {}
    chosen = {name: x for name, x in methods(options.length).items() if name in (BASELINE, *options.methods)}
    for name, arguments in chosen.items():
        step = jax.jit(partial(sj.training.loss_and_grad, **arguments))
        programs[name] = step.lower(model, batch).compile()
        cpu[name], clock[name] = [], []
        print(f"compiled: {name}", flush=True)
    losses = {name: float(program(model, batch)[0]) for name, program in programs.items()}
    for turn in range(options.repeats):
        for name, program in programs.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(model, batch))
            clock[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
            print(f"turn {turn + 1} of {options.repeats}: {name} {clock[name][-1]:.1f} s", flush=True)
    rows = [
        {
            "method": name,
            "loss": losses[name],
            "seconds": statistics.median(clock[name]),
            "CPU seconds": statistics.median(cpu[name]),
            "ratio": median_ratio(cpu[name], cpu[BASELINE]),
            "temporaries MB": program.memory_analysis().temp_size_in_bytes / 1e6,
        }
        for name, program in programs.items()
    ]
    report("backprop/step_time", rows, options.output, parameters=CONFIG.parameter_count, length=options.length)


if __name__ == "__main__":
    main()
