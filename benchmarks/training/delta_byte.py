"""Gated DeltaNet and windows read a hundred times their training length: perplexity by position.

    python -m benchmarks.training.delta_byte [--dense --runs=runs]

models/delta_byte was trained by configs/delta_byte.py on rows of 256 bytes. It reads held-out streams. At each position
the same 1,024 bytes are read twice: by the stream that has come so far, and by a new one that has read the 256 bytes in
front of them and nothing else. `perplexity ratio` is the one over the other: 1 is flat, below 1 the stream has learnt
something from what lies farther back. `state` is what a stream takes there. With `--dense` the same model with full
attention in all layers is trained as long, and read beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import report
from streamjax.byte_units import human_bytes
from streamjax.data import DataConfig, make_eval_batches
from streamjax.training import TrainConfig, train

NAME = "training/delta_byte"
ROOT = Path(__file__).parents[2]
CONFIG = runpy.run_path(str(ROOT / "configs" / "delta_byte.py"))
LENGTH, PROBE, STREAMS = 256, 1024, 2
TIMES = (1, 10, 100)  # the training length


def dense_config() -> TrainConfig:
    return dataclasses.replace(CONFIG["get_config"](), name="dense_byte", model=CONFIG["dense"]())


def held_out(length: int) -> np.ndarray:
    """Streams of the test split, [STREAMS, length]."""
    data = DataConfig(packing="streams", seq_len=LENGTH, batch_size=STREAMS)
    rows = make_eval_batches(data, -(-length // LENGTH), split="test")
    return np.concatenate([np.asarray(row["tokens"]) for row in rows], axis=1)[:, :length]


def lines(model: sj.Decoder, tokens: np.ndarray) -> list[dict[str, Any]]:
    """Bits per byte of PROBE bytes behind each of TIMES lengths, in the stream and in a new one."""
    cache = sj.kv.preset("dense", capacity=tokens.shape[1])

    def bits(state: sj.StreamState, part: np.ndarray) -> tuple[sj.StreamState, float]:
        state, nats = sj.score(model, state, part, LENGTH)
        return state, float(np.mean(np.asarray(nats)) / np.log(2))

    state, read, found = sj.init_state(model, cache, STREAMS), 0, []
    for times in TIMES:
        start = times * LENGTH
        state, _ = bits(state, tokens[:, read:start])
        state, streamed = bits(state, tokens[:, start : start + PROBE])
        read = start + PROBE
        new, _ = bits(sj.init_state(model, cache, STREAMS), tokens[:, start - LENGTH : start])
        _, alone = bits(new, tokens[:, start : start + PROBE])
        used = sj.init_state(model, sj.kv.preset("dense", capacity=start + PROBE)).cache_bytes
        found.append(
            {
                "position": f"{times}x: {start:,}",
                "bits per byte, stream": streamed,
                "bits per byte, new": alone,
                "perplexity ratio": round(2 ** (streamed - alone), 3),
                "state": human_bytes(used),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", action="store_true", help="train the model with full attention, and read it too")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where it is trained")
    options = parser.parse_args()
    tokens, folders = held_out(max(TIMES) * LENGTH + PROBE), {"delta_byte": ROOT / "models" / "delta_byte"}
    if options.dense:
        train(dense_config(), options.runs / "dense_byte")
        folders["dense_byte"] = options.runs / "dense_byte" / "model"
    rows = [
        {"model": name, **line}
        for name, folder in folders.items()
        for line in lines(sj.load(folder, jnp.float32), tokens)
    ]
    report(NAME, rows, streams=STREAMS)


if __name__ == "__main__":
    main()
