"""Decoding over a long cache: reading the best pages against reading everything.

    python -m benchmarks.caches.page_decode                     # 2 cores: some 2 minutes
    python -m benchmarks.caches.page_decode --tokens 65536 262144 --top-k 32 128

Caches of both kinds hold the same drawn keys and values, put there through the tiers themselves; then tokens are
generated, turns alternating in one process, and the ratio is the median over turns. `read` is the part of the stored
tokens that a query attends to. This measures time only: what is drawn has nothing to be found.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import interleaved, median_ratio, report

NEW = 8
PIECE = 8192  # tokens that are put into the caches at a time


@partial(jax.jit, donate_argnums=0)
def put(state: sj.StreamState, key: jax.Array) -> sj.StreamState:
    """A stream that has seen `PIECE` more tokens, with drawn keys and values in every layer."""
    layers = []
    position = state.position[:, None] + jnp.arange(PIECE, dtype=jnp.uint32)
    for index, (cache, tiers) in enumerate(zip(state.caches, state.layers, strict=True)):
        sample = jax.tree.leaves(tiers[-1])[0]
        drawn = jax.random.normal(jax.random.fold_in(key, index), (2, 1, sample.shape[1], PIECE, sample.shape[3]))
        valid = jnp.ones((1, 1, PIECE), bool)
        tokens = sj.kv.KVTokens(k=drawn[0], v=drawn[1], raw_k=drawn[0], position=position[:, None], valid=valid)
        new = []
        for tier, part in zip(cache.tiers, tiers, strict=True):
            part, tokens = tier.insert(part, tokens)
            new.append(part)
        layers.append(tuple(new))
    seen, moved = state.seen + PIECE, state.position + jnp.uint32(PIECE)
    return dataclasses.replace(state, layers=tuple(layers), seen=seen, position=moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 262144], help=f"multiples of {PIECE}")
    parser.add_argument("--top-k", type=int, nargs="+", default=[32, 128], help="pages of 64 tokens that are read")
    parser.add_argument("--repeats", type=int, default=7, help="turns; the median counts")
    arguments = parser.parse_args()
    config = sj.UniformConfig(
        vocab_size=8192, d_model=512, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64, mlp_dim=1408,
        tie_embeddings=True,
    )  # fmt: skip
    model = sj.Decoder(config, jax.random.key(0))
    rows = []
    for tokens in arguments.tokens:
        caches = {"dense": sj.kv.preset("dense", capacity=tokens + PIECE)}
        for top_k in arguments.top_k:
            pages = sj.kv.Pages(64, tokens, top_k, sj.kv.MinMax())
            caches[f"{top_k} pages"] = sj.kv.Cascade(sj.kv.Window(64), pages)
        runs = {}
        for name, cache in caches.items():
            stream = [sj.init_state(model, cache)]
            for piece in range(tokens // PIECE):
                stream[0] = put(stream[0], jax.random.key(piece))

            def decode(stream: list = stream) -> None:
                empty, greedy = np.zeros((1, 0), np.int32), sj.Sampler(temperature=0)
                stream[0], _ = sj.generate(model, stream[0], empty, max_new_tokens=NEW, sampler=greedy)
                jax.block_until_ready(stream[0])

            runs[name] = decode
        seconds = interleaved(runs, arguments.repeats)
        for name, times in seconds.items():
            few = next((k for k in arguments.top_k if name == f"{k} pages"), None)
            rows.append(
                {
                    "cached tokens": f"{tokens:,}",
                    "cache": name,
                    "read": "all" if few is None else f"1/{tokens / (64 * few + 64):.0f}",
                    "ms a token": 1e3 * statistics.median(times) / NEW,
                    "x dense": median_ratio(seconds["dense"], times),
                }
            )
            print(rows[-1], flush=True)
    report("caches/page_decode", rows, parameters=config.parameter_count)


if __name__ == "__main__":
    main()
