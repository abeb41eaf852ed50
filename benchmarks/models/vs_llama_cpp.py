"""Prefill and decode of one GGUF file: streamjax with weights of several kinds, and llama.cpp.

    python -m benchmarks.models.vs_llama_cpp --model FILE.gguf --python PATH   # PATH: a Python that has llama_cpp

llama.cpp comes as `pip install llama-cpp-python`, best into an environment of its own. There is no wheel on PyPI: pip
compiles it, which wants a C++ compiler and takes some 10 CPU minutes. Each side has processes of its own, in turn, as
in `benchmarks.models.vs_transformers`, with the same work: one stream, all cores, prefill of 1,024 tokens, then greedy
decoding over them. llama.cpp multiplies codes of 4 bits by activations that it rounds to 8 bits; streamjax rounds no
activations, and float32 is what the file's codes stand for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from typing import Any

from benchmarks.models.vs_transformers import CACHED, NEW, Phases, comparison, our_phases, prompt, timed
from benchmarks.reporting import in_own_process, report

MODULE = "benchmarks.models.vs_llama_cpp"
PEER = "llama.cpp"
SIDES = (PEER, "streamjax, int4", "streamjax, int8", "streamjax, float32")


def llama_phases(file: str) -> Phases:
    """llama.cpp, through its Python package's low-level calls."""
    from llama_cpp import Llama

    cores = len(os.sched_getaffinity(0))
    model = Llama(file, n_ctx=CACHED + NEW, n_threads=cores, n_threads_batch=cores, verbose=False)
    tokens = prompt(model.n_vocab())[0].tolist()

    def prefill() -> None:
        model.reset()
        model.eval(tokens)

    def decode() -> None:
        model.n_tokens = CACHED  # what lies behind is dropped by the next call
        for _ in range(NEW):
            model.eval([model.sample(temp=0.0)])

    return {"prefill": prefill, "decode": decode}


def phases_of(side: str, file: str) -> Phases:
    """What a side does."""
    if side == PEER:
        return llama_phases(file)
    kind = side.rpartition(" ")[2]
    return our_phases(file, "float32", None if kind == "float32" else kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--python", default=sys.executable, help="a Python that has llama_cpp; this one by default")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side; the median counts")
    parser.add_argument("--turns", type=int, default=5, help="turns of a process, behind one that warms up")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(timed(phases_of(arguments.child, arguments.model), arguments.turns)))
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    options = ("--model", arguments.model, "--turns", arguments.turns)
    for turn, side in itertools.product(range(arguments.rounds), SIDES):
        python = arguments.python if side == PEER else sys.executable
        found[side].append(in_own_process(MODULE, *options, "--child", side, python=python))
        print(f"round {turn + 1} of {arguments.rounds}, {side}: {found[side][-1]}", flush=True)
    rows = comparison(found, [({"side": side}, side, PEER) for side in SIDES], "llama.cpp's time / this")
    report("models/vs_llama_cpp", rows, rounds=arguments.rounds, turns=arguments.turns)


if __name__ == "__main__":
    main()
