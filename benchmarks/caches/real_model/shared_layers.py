"""Layers of a real model that share a part of a prompt: what the text behind it costs, and the bytes of the state.

    python -m benchmarks.caches.real_model.shared_layers --model=FOLDER

SmolLM2-135M-Instruct in float32 (30 layers, three key heads of 64 channels) reads Python's own help topics
(`pydoc_data.topics`) into a dense cache; then `sj.compact` lays the prompt out, and the text goes on. `nats` are a
token's on average, of the tokens behind the prompt. `MB` are the bytes of the state then, with room for what follows;
`of dense` their share of a dense cache's that ends where they do. `streaming_llm` keeps sinks and the newest tokens of
the prompt.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import report
from streamjax.kv.presets.registry import Built


def rules(tokens: int, room: int) -> dict[str, Built]:
    """What the prompt is laid out by."""
    return {
        "minicache": sj.kv.preset("minicache", room=room),
        "minicache, from the first layer on": sj.kv.preset("minicache", start=0.0, room=room),
        "xkv": sj.kv.preset("xkv", room=room),
        "xkv, half of the channels": sj.kv.preset("xkv", keys=0.5, values=0.5, room=room),
        "streaming_llm": sj.kv.preset("streaming_llm", sinks=4, window=tokens // 2 - 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    parser.add_argument("--behind", type=int, default=256, help="tokens that follow")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    whole = arguments.tokens + arguments.behind
    ids = np.array([tokenizer.encode("\n".join(topics.values()))[:whole]], np.int32)
    prompt, rest = ids[:, : arguments.tokens], ids[:, arguments.tokens :]
    state = sj.read(model, sj.init_state(model, sj.kv.preset("dense", capacity=whole)), prompt, 256)
    dense, rows = state.cache_bytes, []
    for name, rule in {"dense": None, **rules(arguments.tokens, arguments.behind)}.items():
        laid = jax.tree.map(jnp.copy, state) if rule is None else sj.compact(model, state, rule)
        size = laid.cache_bytes
        nats = float(np.asarray(sj.score(model, laid, rest, 256)[1]).mean(dtype=np.float64))
        row = {"cache": name, "MB": size / 1e6, "of dense": size / dense, "nats": nats, "perplexity": math.exp(nats)}
        rows.append(row)
        print(row, flush=True)
    report("caches/real_model/shared_layers", rows, arguments.output, tokens=arguments.tokens, behind=arguments.behind)


if __name__ == "__main__":
    main()
