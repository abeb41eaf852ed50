"""One million tokens through one process: does its memory stay what it is?

    python -m benchmarks.caches.million_tokens                          # some minutes a cache on 2 cores
    python -m benchmarks.caches.million_tokens --caches window h2o:window=64,size=384 --tokens 200000
    python -m benchmarks.caches.million_tokens --caches NAME --tiny    # any preset, a random model of one layer

The model of the repository reads held-out text, over and over, in stretches of 8,192 tokens that are scored, and after
each of them goes on by 32 tokens of its own. Both caches hold 512 tokens; `streaming_llm` has 4 of them as sinks. Any
other preset can be named, as in every command, if it has no end before the last token. Each has a fresh process, which
notes after every stretch how much memory it has in RAM (`resident`), what of it the C library has given out and not got
back (`heap`; Linux with glibc), and how many JAX arrays live (`arrays`). Figures are MB, medians over the four quarters
of the stream; `state` is the stream's own.

The process has one heap for all its threads (MALLOC_ARENA_MAX=1). With glibc's usual one for each thread, resident
memory moves up and down by the scan's scratch block of 19 MB, as now one thread and now another keeps it in reserve;
what is given out stays the same.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import streamjax as sj
from benchmarks.reporting import report
from streamjax.data import corpus_text
from streamjax.evaluation import resident_bytes

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "stdlib_byte"
CACHES = {"streaming_llm": "streaming_llm:sinks=4,window=508", "window": "window:window=512"}
STRETCH, NEW = 8192, 32  # tokens scored, and tokens generated after them


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _NAMES = (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )  # fmt: skip
    _fields_ = tuple((name, ctypes.c_size_t) for name in _NAMES)


def heap_bytes() -> int | None:
    """Bytes that the C library has given out and not got back; None where it does not say (glibc does, from 2.33)."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def tiny_model() -> sj.Decoder:
    """One layer, as wide as it must be to have heads that share keys; random."""
    config = sj.UniformConfig(
        vocab_size=256, d_model=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=16,
        rope=sj.RopeConfig(),
    )  # fmt: skip
    return sj.Decoder(config, jax.random.key(0), dtype=np.float32)


def stream(cache: str, tokens: int, tiny: bool = False) -> dict[str, Any]:
    """Read at least `tokens` tokens in this process: what came out, and bytes of memory after every stretch."""
    model, tokenizer = tiny_model() if tiny else sj.load(MODEL), sj.load_tokenizer(MODEL)
    ids = np.asarray(tokenizer.encode(corpus_text("test")), np.int32) % model.config.vocab_size
    count = max(-(-tokens // (STRETCH + NEW)), 4)
    name, options = sj.kv.parse_preset(CACHES.get(cache, cache))
    state = sj.init_state(model, sj.kv.preset(name, **options))
    noted: dict[str, list[int | None]] = {"resident": [], "heap": [], "arrays": []}
    greedy, nothing, nats = sj.Sampler(temperature=0), np.zeros((1, 0), np.int32), 0.0
    started = time.perf_counter()
    for i in range(count):
        place = i * STRETCH % (len(ids) - STRETCH)
        state, nll = sj.score(model, state, ids[None, place : place + STRETCH])
        nats += float(nll.mean()) / count
        state, new = sj.generate(model, state, nothing, max_new_tokens=NEW, sampler=greedy)
        jax.block_until_ready(new)
        del nll, new
        gc.collect()
        noted["resident"].append(resident_bytes())
        noted["heap"].append(heap_bytes())
        noted["arrays"].append(len(jax.live_arrays()))
    return {
        "tokens": count * (STRETCH + NEW),
        "tokens_seen": int(state.seen[0]),
        "seconds": time.perf_counter() - started,
        "nats_per_token": nats,
        "cache_bytes": state.cache_bytes,
        **noted,
    }


def quarters(values: Sequence[int]) -> list[float]:
    """Medians over the four quarters of a series, of four values at least."""
    edges = [i * len(values) // 4 for i in range(5)]
    return [statistics.median(values[start:end]) for start, end in itertools.pairwise(edges)]


def run(cache: str, tokens: int, tiny: bool = False) -> dict[str, Any]:
    """`stream` in a fresh process.

    Raises:
      RuntimeError: it failed; the message is its last line.
    """
    command = [sys.executable, "-m", "benchmarks.caches.million_tokens", "--child", cache, "--tokens", str(tokens)]
    command += ["--tiny"] * tiny
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{cache}: {child.stderr.strip().splitlines()[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def row(cache: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A line of the table: MB, by quarters of the stream."""

    def by_quarter(key: str) -> str:
        values = figures[key]
        return "-" if None in values else ", ".join(f"{value / 1e6:.2f}" for value in quarters(values))

    return {
        "cache": cache,
        "tokens": f"{figures['tokens']:,}",
        "tokens/s": f"{figures['tokens'] / figures['seconds']:,.0f}",
        "state": f"{figures['cache_bytes'] / 1e6:.2f}",
        "resident": by_quarter("resident"),
        "heap": by_quarter("heap"),
        "arrays": f"{figures['arrays'][0]} to {figures['arrays'][-1]}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", nargs="+", default=list(CACHES), help="window, streaming_llm, or any other preset")
    parser.add_argument("--tiny", action="store_true", help="a random model of one layer")
    parser.add_argument("--tokens", type=int, default=10**6, help="rounded up to whole stretches; 4 at least")
    parser.add_argument(
        "--output", type=Path, help="JSON file; benchmarks/results/caches/million_tokens.json by default"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(stream(arguments.child, arguments.tokens, arguments.tiny)))
        return
    figures = {cache: run(cache, arguments.tokens, arguments.tiny) for cache in arguments.caches}
    report(
        "caches/million_tokens",
        [row(*item) for item in figures.items()],
        arguments.output,
        bytes_after_stretches=figures,
    )


if __name__ == "__main__":
    main()
