"""Reading a long text over a long cache: each block of tokens reads the best pages, or all that came before.

    python -m benchmarks.caches.page_prefill                    # 2 cores: some 4 minutes

Drawn tokens go through `sj.read` in chunks of 512, from the stream's beginning; 64 neighbouring tokens choose their
pages together. Turns alternate in one process, and the ratio is the median over turns. `pages read` is how many pages
of 64 tokens an average block of 64 tokens attends to, window and chunk included. This measures time only.
"""

from __future__ import annotations

import argparse
import statistics

import jax
import numpy as np

import streamjax as sj
from benchmarks.reporting import interleaved, median_ratio, report

PAGE, BLOCK, CHUNK, WINDOW = 64, 64, 512, 512


def pages_read(tokens: int, top_k: int | None) -> float:
    """Pages with keys that an average block of queries attends to."""
    blocks = np.arange(tokens // BLOCK)
    if top_k is None:
        return float(np.mean(blocks + 1))
    in_chunk = blocks % (CHUNK // BLOCK) + 1
    before = blocks - in_chunk + 1
    near = np.minimum(before, WINDOW // PAGE)
    return float(np.mean(in_chunk + near + np.minimum(before - near, top_k)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--top-k", type=int, default=16, help=f"pages of {PAGE} tokens that are read")
    parser.add_argument("--repeats", type=int, default=3, help="turns; the median counts")
    arguments = parser.parse_args()
    config = sj.UniformConfig(
        vocab_size=8192, d_model=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=704,
        tie_embeddings=True,
    )  # fmt: skip
    model = sj.Decoder(config, jax.random.key(0))
    rows = []
    for length in arguments.tokens:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length)).astype(np.int32)
        pages = sj.kv.Pages(PAGE, length, arguments.top_k, sj.kv.MinMax(), block=BLOCK)
        caches = {
            "dense": (sj.kv.preset("dense", capacity=length), None),
            f"{arguments.top_k} pages": (sj.kv.Cascade(sj.kv.Window(WINDOW), pages), arguments.top_k),
        }
        runs = {}
        for name, (cache, _) in caches.items():

            def read(cache: sj.kv.Cache = cache, tokens: np.ndarray = tokens) -> None:
                jax.block_until_ready(sj.read(model, sj.init_state(model, cache), tokens, CHUNK))

            runs[name] = read
        seconds = interleaved(runs, arguments.repeats, warmup=1)
        for name, (_, top_k) in caches.items():
            rows.append(
                {
                    "tokens": f"{length:,}",
                    "cache": name,
                    "pages read": pages_read(length, top_k),
                    "x fewer": pages_read(length, None) / pages_read(length, top_k),
                    "seconds": statistics.median(seconds[name]),
                    "x dense": median_ratio(seconds["dense"], seconds[name]),
                }
            )
    report("caches/page_prefill", rows, parameters=config.parameter_count)


if __name__ == "__main__":
    main()
