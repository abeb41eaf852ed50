"""Keys and values in few bits: perplexity of a real model, bytes of a token, and what a decoded token costs.

    python -m benchmarks.caches.codecs --model=FOLDER

SmolLM2-135M-Instruct reads the text of Python's own help topics (`pydoc_data.topics`) as one stream, with 4 sinks and a
window of 2,044 tokens, stored by each codec, in chunks of 64 tokens: queries see at most a chunk more in full precision
than those of a stream of single tokens. `perplexity` is that of all tokens behind the first 1,024,
`against exact` how much above that of float32 slots. `bytes` are of a token's keys and values in all layers, as the
arrays of the window have them, what waits in full precision left out. `decode` is of one token behind 8,064 drawn keys
and values in every layer (`Full`): seconds of the CPU and of the clock, the best of five runs of 16 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import report
from streamjax.kv.codecs.codec import Codec, bytes_per_token
from streamjax.kv.tier import KVTokens

SKIPPED, CHUNK, WINDOW, CACHED, DECODED, RUNS = 1024, 64, 2044, 8064, 16, 5
CODECS: dict[str, Codec | None] = {
    "float32": None,
    "int8": sj.kv.Int(8),
    "int4": sj.kv.Int(4),
    "int4, groups of 32": sj.kv.Int(4, group=32),
    "int2, groups of 32, residual of 128 (KIVI)": sj.kv.Int(2, group=32, residual=128),
    'the same, fit="error"': sj.kv.Int(2, group=32, residual=128, fit="error"),
    'int2, groups of 32, residual of 512, fit="error"': sj.kv.Int(2, group=32, residual=512, fit="error"),
    "fp8": sj.kv.FP8(),
}


def perplexity(model: sj.Decoder, codec: Codec | None, tokens: np.ndarray) -> float:
    """Of a stream with sinks and a window that is stored by a codec."""
    cache = sj.kv.Cascade(sj.kv.Sink(4), sj.kv.Window(WINDOW, codec=codec))
    _, nats = sj.score(model, sj.init_state(model, cache), tokens, CHUNK)
    return math.exp(float(np.mean(np.asarray(nats)[0, SKIPPED:])))


def filled(model: sj.Decoder, codec: Codec | None) -> sj.StreamState:
    """A stream whose layers hold drawn keys and values."""
    tier = sj.kv.Full(CACHED + 128, codec=codec)
    state = sj.init_state(model, sj.kv.Cascade(tier))
    mixer = model.config.blocks[0].mixer
    shape = 1, mixer.num_kv_heads, CACHED, mixer.head_dim

    @jax.jit
    def store(layer: tuple, key: jax.Array) -> tuple:
        k, v = jax.random.normal(key, (2, *shape), model.dtype)
        position = jnp.arange(CACHED, dtype=jnp.uint32)[None, None]
        tokens = KVTokens(k, v, k, position, jnp.ones(position.shape, bool))
        return (tier.store(layer[0], tokens),)

    layers = tuple(store(layer, jax.random.key(i)) for i, layer in enumerate(state.layers))
    seen = jnp.full((1,), CACHED)
    return dataclasses.replace(state, layers=layers, position=seen.astype(jnp.uint32), seen=seen.astype(jnp.int32))


def decode(model: sj.Decoder, codec: Codec | None) -> tuple[float, float]:
    """Seconds of the CPU and of the clock that a token takes."""
    state, best = filled(model, codec), (math.inf, math.inf)
    token = np.array([[5]], np.int32)
    for run in range(RUNS + 1):
        start = time.process_time(), time.perf_counter()
        for _ in range(DECODED):
            state, _ = sj.step(model, state, token)
        jax.block_until_ready(state)
        took = time.process_time() - start[0], time.perf_counter() - start[1]
        if run:  # the first one compiles
            best = min(best[0], took[0] / DECODED), min(best[1], took[1] / DECODED)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), help="some of them, by name; float32 first")
    parser.add_argument("--parts", nargs="+", default=["perplexity", "decode"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model, dtype="float32"), sj.load_tokenizer(arguments.model)
    tokens = np.array([tokenizer.encode("\n".join(topics.values()))], np.int32)[:, : arguments.tokens]
    mixers = [block.mixer for block in model.config.blocks]
    rows: list[dict] = []
    exact = None
    for name in arguments.codecs:
        codec = CODECS[name]
        each = [8.0 * m.head_dim if codec is None else bytes_per_token(codec, m.head_dim) for m in mixers]
        row = {"codec": name, "bytes": sum(m.num_kv_heads * size for m, size in zip(mixers, each, strict=True))}
        if "perplexity" in arguments.parts:
            row["perplexity"] = perplexity(model, codec, tokens)
            exact = exact or row["perplexity"]
            row["against exact"] = row["perplexity"] / exact - 1
        if "decode" in arguments.parts:
            row["decode, CPU s"], row["decode, s"] = decode(model, codec)
        rows.append(row)
        print(row, flush=True)
    report("caches/codecs", rows, arguments.output, tokens=tokens.shape[1], window=WINDOW, cached=CACHED)


if __name__ == "__main__":
    main()
