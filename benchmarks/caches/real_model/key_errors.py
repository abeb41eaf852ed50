"""What codes by token make of a real model's keys and values: the error, by bits, group and transformation.

    python -m benchmarks.caches.real_model.key_errors --model=FOLDER      # a quarter of a minute

The first layers of SmolLM2-135M-Instruct in float32 read 256 tokens of this repository's README. A cell is the root of
the summed squared error, as a share of what keys (or values) differ from their mean: what a tier that chooses tokens
loses, since each token is coded by itself there. `bytes` are a token's of one head, keys and values together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import streamjax as sj
from benchmarks.reporting import report
from streamjax.kv.codecs.codec import Codec, bytes_per_token

TOKENS, LAYERS = 256, (1, 7)
CODECS: dict[str, Codec] = {
    "Int(8)": sj.kv.Int(8),
    "Int(4)": sj.kv.Int(4, fit="error"),
    "Int(4, group=16)": sj.kv.Int(4, group=16, fit="error"),
    "Hadamard(Int(4))": sj.kv.Hadamard(sj.kv.Int(4, fit="error")),
    "Int(2, group=32)": sj.kv.Int(2, group=32, fit="error"),
    "Hadamard(Int(2, group=32))": sj.kv.Hadamard(sj.kv.Int(2, group=32, fit="error")),
}


def error(codec: Codec, x: np.ndarray) -> float:
    """The codec's error on keys or values [B, K, S, D] of one layer."""
    codes = codec.one_by_one().encode(jnp.asarray(x)[:, :, :, None], "k")
    found = np.asarray(codec.one_by_one().decode(codes, "k"))[:, :, :, 0]
    return float(np.sqrt(np.square(found - x).sum() / np.square(x - x.mean(axis=2, keepdims=True)).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--output", type=Path, help="where the JSON goes, if not to the results")
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    model.layers = nnx.List(list(model.layers)[: LAYERS[-1] + 1])
    model.config = model.config.replace(blocks=model.config.blocks[: LAYERS[-1] + 1])
    text = (Path(__file__).parents[3] / "README.md").read_text()
    cache = sj.kv.Cascade(sj.kv.Full(TOKENS))
    state = sj.read(model, sj.init_state(model, cache), [tokenizer.encode(text)[:TOKENS]], TOKENS)
    rows: list[dict[str, Any]] = []
    for name, codec in CODECS.items():
        row = {"codec": name, "bytes": f"{bytes_per_token(codec.one_by_one(), 64):.0f}"}
        for layer in LAYERS:
            slots = state.layers[layer][0]
            row |= {f"{what} of layer {layer}": f"{error(codec, np.asarray(x, np.float32)):.3f}"
                    for what, x in (("keys", slots.k), ("values", slots.v))}  # fmt: skip
        rows.append(row)
        print(row, flush=True)
    report("caches/real_model/key_errors", rows, arguments.output)


if __name__ == "__main__":
    main()
