"""Prefill and decode of SmolLM2-135M against `transformers` on torch CPU, each side in a process of its own.

    python -m benchmarks.models.vs_transformers                    # drawn weights; some 8 minutes on 2 quiet cores
    python -m benchmarks.models.vs_transformers --model FOLDER     # any Llama in Hugging Face's layout

Two runtimes in one process disturb each other: their pools of threads wait for work on the same cores. Here a process
loads the model, measures one runtime and ends; then the next one starts. Both run one stream on all cores, in float32
and in bfloat16: prefill of 1,024 tokens, and greedy decoding over 1,024 cached tokens (`transformers`: its dynamic
cache and sdpa attention; streamjax: `sj.read` and `sj.generate` over a streaming_llm cache of 4 + 1,020). Time does not
depend on the weights.

A process warms up and takes the median of its turns; the table has the medians over processes. The ratio is that of
wall seconds, the median over pairs of processes that followed each other. `load` is the system's load average when a
process began to measure, the highest of its side: much more than what the process before has left means that the
machine was not quiet, and that the figures are worth little. CPU seconds are of all threads.
`benchmarks.kernels.prefill_products` says how far a prefill can be ahead: its products alone take most of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.models.drawn import SMOLLM2, write_drawn
from benchmarks.reporting import in_turn, median_ratio, report

MODULE = "benchmarks.models.vs_transformers"
SIDES = ("transformers", "streamjax")
DTYPES = ("float32", "bfloat16")
CACHED, NEW = 1024, 32
Phases = dict[str, Callable[[], Any]]


def prompt(vocab_size: int) -> np.ndarray:
    """[1, CACHED] token ids."""
    return np.random.default_rng(0).integers(0, vocab_size, (1, CACHED)).astype(np.int32)


def torch_phases(folder: str, dtype: str) -> Phases:
    """`transformers`: a prefill, and decoding from the cache that it filled."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    tokens = torch.tensor(prompt(model.config.vocab_size), dtype=torch.long)
    filled: dict[str, Any] = {}

    @torch.inference_mode()
    def prefill() -> None:
        output = model(tokens, use_cache=True, logits_to_keep=1)
        filled.update(cache=output.past_key_values, token=output.logits[:, -1:].argmax(-1))
        filled["token"].item()

    @torch.inference_mode()
    def decode() -> None:
        token = filled["token"]
        for _ in range(NEW):
            output = model(token, past_key_values=filled["cache"], use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            token.item()
        filled["cache"].crop(-NEW)  # so that every turn reads the same number of cached tokens

    return {"prefill": prefill, "decode": decode}


def our_phases(path: str, dtype: str, weights: str | None = None) -> Phases:
    """streamjax: the same from a full endless cache; `weights` as in `sj.load`."""
    import jax

    import streamjax as sj

    model = sj.load(path, dtype=dtype, weights=weights)
    tokens, nothing = prompt(model.config.vocab_size), np.zeros((1, 0), np.int32)
    cache, greedy = sj.kv.preset("streaming_llm", sinks=4, window=CACHED - 4), sj.Sampler(temperature=0)
    filled: dict[str, Any] = {}

    def prefill() -> None:
        state = sj.init_state(model, cache)
        filled["state"] = jax.block_until_ready(sj.read(model, state, tokens))

    def decode() -> None:
        filled["state"], out = sj.generate(model, filled["state"], nothing, max_new_tokens=NEW, sampler=greedy)
        jax.block_until_ready(out)

    return {"prefill": prefill, "decode": decode}


def timed(phases: Phases, turns: int) -> dict[str, Any]:
    """Seconds and CPU seconds of each phase, medians over turns behind one that warms up; the load average before."""
    for run in phases.values():
        run()
    found: dict[str, Any] = {"load": os.getloadavg()[0]}
    for phase, run in phases.items():
        wall, cpu = [], []
        for _ in range(turns):
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        found[phase] = [statistics.median(wall), statistics.median(cpu)]
    return found


def comparison(
    found: Mapping[Any, Sequence[Mapping[str, Any]]], sides: Sequence[tuple[dict[str, str], Any, Any]], ratio: str
) -> list[dict[str, Any]]:
    """Rows of a table, by phase.

    Args:
      found: what `timed` found in each process, by side.
      sides: of each its name in columns, itself, and the one whose time is divided by its own.
      ratio: the name of that column.
    """
    rows = []
    for phase, tokens in (("prefill", CACHED), ("decode", NEW)):
        for name, side, peer in sides:
            wall, other = ([one[phase][0] for one in found[each]] for each in (side, peer))
            seconds = statistics.median(wall)
            rows.append(
                {
                    "phase": phase,
                    **name,
                    "seconds": seconds,
                    "CPU seconds": statistics.median(one[phase][1] for one in found[side]),
                    "tokens/s": tokens / seconds,
                    "ms a token": 1000 * seconds / tokens,
                    ratio: median_ratio(other, wall),
                    "load": max(one["load"] for one in found[side]),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in Hugging Face's layout; drawn weights by default")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side; the median counts")
    parser.add_argument("--turns", type=int, default=5, help="turns of a process, behind one that warms up")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, dtype, folder = arguments.child
        phases = (torch_phases if side == "transformers" else our_phases)(folder, dtype)
        print(json.dumps(timed(phases, arguments.turns)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model or write_drawn(SMOLLM2, temporary)
        cases = {(dtype, side): (side, dtype, folder) for dtype, side in itertools.product(DTYPES, SIDES)}
        found = in_turn(MODULE, arguments.rounds, cases, "--turns", arguments.turns)
    kinds = itertools.product(DTYPES, SIDES)
    sides = [({"dtype": dtype, "side": side}, (dtype, side), (dtype, SIDES[0])) for dtype, side in kinds]
    rows = comparison(found, sides, "transformers' time / this")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    report("models/vs_transformers", rows, rounds=arguments.rounds, turns=arguments.turns, **versions)


if __name__ == "__main__":
    main()
