"""Loading a Hugging Face folder: seconds and peak host memory, against `transformers` loading the same file.

    python -m benchmarks.models.loading                    # SmolLM2-135M's shape and a drawn model of 2 GB
    python -m benchmarks.models.loading --model FOLDER     # SmolLM2 itself, or another model, instead of the first

Each load has a process of its own, in turn, with the other ones ended; the table has medians over rounds. The files are
bfloat16 and in the system's page cache. `peak` is the largest resident memory of the process, `over import` how much
that is above what `import streamjax` alone takes, which imports nothing else (or torch and `transformers`), and `over
weights` what of that is not the weights in their dtype: with streamjax, JAX and all that loading imports. `seconds`
begin when everything is imported and end when every weight has been read once.

`transformers` maps the file, so bfloat16 weights are the system's pages and are not copied. streamjax reads them into
memory of its own, lays matrices input-major and checks the folder's checksums, where it has any. `system` is the part
of the CPU seconds that the kernel takes, above all to find and clear pages. On the virtual machine of this table it is
most of it, and was two to three times as much with the huge pages that NumPy asks for as without them:
`NUMPY_MADVISE_HUGEPAGE=0` in the environment takes them away.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.models.drawn import SMOLLM2, TWO_GIGABYTES, write_drawn
from benchmarks.reporting import in_own_process, report

MODULE = "benchmarks.models.loading"
SIDES = ("streamjax", "transformers")
DTYPES = ("bfloat16", "float32")


def resident(name: str) -> int:
    """A figure of this process's memory, in bytes: VmRSS now, or VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def our_load(folder: str, dtype: str) -> Callable[[], int]:
    """What loads with streamjax and returns the bytes of the weights; all that it needs is imported."""
    import jax
    import numpy as np

    import streamjax as sj

    load = sj.load
    jax.devices()

    def run() -> int:
        leaves = jax.tree.leaves(load(folder, dtype=dtype))
        for leaf in leaves:
            np.asarray(leaf).reshape(-1).view(np.uint8).max()  # where it lies: nothing is compiled for it
        return sum(leaf.nbytes for leaf in leaves)

    return run


def torch_load(folder: str, dtype: str) -> Callable[[], int]:
    """The same with `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM

    def run() -> int:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.max().item()
        return sum(parameter.nbytes for parameter in parameters)

    return run


def measure(side: str, folder: str, dtype: str) -> dict[str, float]:
    """One load, in this process, which has imported nothing yet."""
    if side == "streamjax":
        import streamjax  # noqa: F401
    else:
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401
    before = resident("VmRSS")
    run = (our_load if side == "streamjax" else torch_load)(folder, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start, cpu, system, load = time.perf_counter(), time.process_time(), os.times().system, os.getloadavg()[0]
    weights = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu": cpu,
        "system": os.times().system - system,
        "before": before,
        "peak": resident("VmHWM"),
        "weights": weights,
        "load": load,
    }


def row(model: str, dtype: str, side: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    """A line of the table."""

    def median(key: str) -> float:
        return statistics.median(run[key] for run in runs)

    over = statistics.median(run["peak"] - run["before"] for run in runs)
    return {
        "model": model,
        "dtype": dtype,
        "side": side,
        "seconds": median("seconds"),
        "CPU seconds": median("cpu"),
        "system": median("system"),
        "weights MB": round(median("weights") / 1e6),
        "peak MB": round(median("peak") / 1e6),
        "over import MB": round(over / 1e6),
        "over weights MB": round((over - median("weights")) / 1e6),
        "load": max(run["load"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in Hugging Face's layout; SmolLM2-135M's shape by default")
    parser.add_argument("--small", action="store_true", help="leave the model of 2 GB out")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each kind; the median counts")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        first = arguments.model or write_drawn(SMOLLM2, f"{temporary}/small")
        models = {"SmolLM2-135M" if arguments.model is None else Path(first).resolve().name: first}
        if not arguments.small:
            models["2 GB, drawn"] = write_drawn(TWO_GIGABYTES, f"{temporary}/large")
        for name, folder in models.items():
            runs: dict[tuple[str, str], list[dict[str, float]]] = {}
            for turn in range(arguments.rounds):
                for dtype in DTYPES:
                    for side in SIDES:
                        found = in_own_process(MODULE, "--child", side, folder, dtype)
                        runs.setdefault((dtype, side), []).append(found)
                        print(f"round {turn + 1}, {name}, {dtype}, {side}: {found}", flush=True)
            rows += [row(name, dtype, side, found) for (dtype, side), found in runs.items()]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    report("models/loading", rows, rounds=arguments.rounds, **versions)


if __name__ == "__main__":
    main()
