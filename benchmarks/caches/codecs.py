"""Keys and values in few bits: perplexity of a real model, bytes of a token, and what a decoded token costs.

    python -m benchmarks.caches.codecs --model=FOLDER

SmolLM2-135M-Instruct reads the text of Python's own help topics (`pydoc_data.topics`) as one stream, with 4 sinks and a
window of 2,044 tokens, stored by each codec, in chunks of 64 tokens: queries see at most a chunk more in full precision
than those of a stream of single tokens. `perplexity` is that of all tokens behind the first 1,024, `against exact` how
much above that of float32 slots. `bytes` are of a token's keys and values in all layers, as the live arrays of the
window have them, what waits in full precision left out; `tables` are kilobytes of codebooks, once a stream. Names of
presets stand for the codec of their last tier. Codebooks (`cq`) are fitted to the last 4,096 tokens of the text, which
no stream reads. `decode` is of one token behind 8,064 drawn keys and values in every layer (`Full`): seconds of the CPU
and of the clock, the best of five runs of 16 tokens.
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
from streamjax.kv.codecs.codec import Codec
from streamjax.kv.codecs.integers import IntByToken
from streamjax.kv.query import KVTokens

SKIPPED, CHUNK, WINDOW, CACHED, DECODED, RUNS = 1024, 64, 2044, 8064, 16, 5
FITTED, ROUNDS = 4096, 8
OF_PRESETS = ("comet", "k_sort", "fireq", "kivi", "gear", "vidkv")
CODECS: dict[str, Codec | None] = {
    "float32": None,
    "int8": sj.kv.Int(8),
    "fp8": sj.kv.FP8(),
    **{name: sj.kv.preset(name).tiers[-1].codec for name in OF_PRESETS},  # type: ignore[union-attr]
    "k_sort, not sorted": sj.kv.BlockFloats(4, sort=False),
    "fireq, not scaled": IntByToken(4),
    "int4, groups of 32": sj.kv.Int(4, group=32),
    'kivi, fit="error"': sj.kv.Int(2, group=32, residual=128, fit="error"),
    'kivi, residual of 512, fit="error"': sj.kv.Int(2, group=32, residual=512, fit="error"),
    "vidkv, no transform": sj.kv.Mixed(transform=False),
    "cq, 4 channels in 8 bits": sj.kv.CQ(4, 8),
    "cq, 4 channels in 8 bits, by gradients": sj.kv.CQ(4, 8),
    "cq, 8 channels in 8 bits": sj.kv.CQ(8, 8),
    "cq, 8 channels in 8 bits, by gradients": sj.kv.CQ(8, 8),
}


def by_layers(model: sj.Decoder, name: str, text: np.ndarray) -> list[Codec | None]:
    """The codec of each layer, with codebooks that fit the end of a text where it takes any."""
    codec = CODECS[name]
    if not isinstance(codec, sj.kv.CQ):
        return [codec] * model.config.num_layers
    weighted = name.endswith("by gradients")
    measured = sj.measure_codebooks(
        model, text[:, -FITTED:].reshape(2, -1), codec.coupled, codec.bits, ROUNDS, by_gradients=weighted
    )
    return [dataclasses.replace(codec, codebooks=layer) for layer in measured.layers]


def perplexity(model: sj.Decoder, codecs: list[Codec | None], tokens: np.ndarray) -> tuple[float, float, float]:
    """Of a stream with sinks and a window that is stored by a codec; bytes of a token, and of tables."""
    caches = tuple(sj.kv.Cascade(sj.kv.Sink(4), sj.kv.Window(WINDOW, codec=codec), fuse=False) for codec in codecs)
    state, nats = sj.score(model, sj.init_state(model, caches), tokens, CHUNK)
    size = tables = 0.0
    for layer in state.layers:
        for slots in (layer[1].k, layer[1].v):
            arrays = [slots] if isinstance(slots, jax.Array) else [slots.codes, *slots.numbers]
            size += sum(x.nbytes for x in arrays) / slots.shape[2]
            tables += sum(x.nbytes for x in getattr(slots, "tables", ()))
    return math.exp(float(np.mean(np.asarray(nats)[0, SKIPPED:]))), size, tables


def filled(model: sj.Decoder, codecs: list[Codec | None]) -> sj.StreamState:
    """A stream whose layers hold drawn keys and values."""
    tiers = [sj.kv.Full(CACHED + 128, codec=codec) for codec in codecs]
    state = sj.init_state(model, tuple(map(sj.kv.Cascade, tiers)))
    mixer = model.config.blocks[0].mixer
    shape = 1, mixer.num_kv_heads, CACHED, mixer.head_dim

    @jax.jit
    def store(layer: tuple, key: jax.Array) -> tuple:
        k, v = jax.random.normal(key, (2, *shape), model.dtype)
        position = jnp.arange(CACHED, dtype=jnp.uint32)[None, None]
        tokens = KVTokens(k, v, k, position, jnp.ones(position.shape, bool))
        return (tiers[0].store(layer[0], tokens),)  # what layers differ in lies in their states

    layers = tuple(store(layer, jax.random.key(i)) for i, layer in enumerate(state.layers))
    seen = jnp.full((1,), CACHED)
    return dataclasses.replace(state, layers=layers, position=seen.astype(jnp.uint32), seen=seen.astype(jnp.int32))


def decode(model: sj.Decoder, codecs: list[Codec | None]) -> tuple[float, float]:
    """Seconds of the CPU and of the clock that a token takes."""
    state, best = filled(model, codecs), (math.inf, math.inf)
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
    parser.add_argument("--exact", type=float, help="the perplexity of float32 slots, where another run found it")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), help="some of them, by name; float32 first")
    parser.add_argument("--parts", nargs="+", default=["perplexity", "decode"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model, dtype="float32"), sj.load_tokenizer(arguments.model)
    text = np.array([tokenizer.encode("\n".join(topics.values()))], np.int32)
    tokens = text[:, : arguments.tokens]
    rows: list[dict] = []
    exact = arguments.exact
    for name in arguments.codecs:
        codecs, row = by_layers(model, name, text), {"codec": name}
        if "perplexity" in arguments.parts:
            found, size, tables = perplexity(model, codecs, tokens)
            exact = exact or found
            row |= {"bytes": size, "tables, kB": tables / 1e3, "perplexity": found, "against exact": found / exact - 1}
        if "decode" in arguments.parts:
            row["decode, CPU s"], row["decode, s"] = decode(model, codecs)
        rows.append(row)
        print(row, flush=True)
    report("caches/codecs", rows, arguments.output, tokens=tokens.shape[1], window=WINDOW, cached=CACHED)


if __name__ == "__main__":
    main()
