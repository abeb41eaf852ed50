"""Reading on behind what is cached: every preset that chooses what it reads, beside dense attention.

    python -m benchmarks.caches.page_prefill --model=MODEL    # 2 cores: some 8 minutes

The first layers of SmolLM2-135M-Instruct in float32 read the text of Python's own help topics (`pydoc_data.topics`) in
chunks of 512. Timed are the four chunks around 1,024, 2,048 and 8,192 tokens, two before and two behind, compiled, in
CPU seconds of all threads. Each preset and `dense` take turns; the ratio is the median over turns, and below 1 the
preset is faster. Presets have their own defaults and room for 16,384 tokens. `retro_infer` clusters a segment when it
is full, which its 8,192 tokens are around 8,192: until then it reads them all, and one of the four chunks clusters
them. With segments of 2,048 tokens one is clustered in four chunks. `inf_llm` holds a window of 4,096 tokens and
notes the attention that they get. `topk_attention` compares a query with every key before it reads any, as its rule
says: half more products than `dense` while it reads nearly all, as around 2,048, and half of `dense`'s at any length.
`shadow_kv` rebuilds every key once a chunk; neighbours read the pages that they chose, and the tokens that wait. Its
bases are found in the chunk that fills the first group, once a stream: around 1,024. `lserve` streams in half of the
key heads, whichever.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import streamjax as sj
from benchmarks.reporting import RESULTS, median_ratio, report

CAPACITY, CHUNK, CHUNKS = 16384, 512, 4
CACHES = (
    "streaming_llm",
    "quest",
    "hip",
    "inf_llm",
    "sentence_kv:ends=30+198",  # the full stop and the line break in this vocabulary
    "dhsa",
    "mpcache",
    "lserve",
    "inst_infer:attend_on=mesh",
    "retro_infer",
    "retro_infer:segment=2048",
    "topk_attention",
    "shadow_kv",
)


def built(word: str, model: sj.Decoder, capacity: int) -> Any:
    """A preset with its own defaults, and room for all that is read where it keeps everything."""
    name, options = sj.kv.parse_preset(word)
    if "capacity" in sj.kv.presets()[name].options:
        options.setdefault("capacity", capacity)
    if name != "lserve":
        return sj.kv.preset(name, **options)
    heads = model.config.blocks[0].mixer.num_kv_heads
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"gates": [[(head + 0.5) / heads for head in range(heads)]] * len(model.layers)}, file)
        file.flush()
        return sj.kv.preset(name, heads=file.name, **options)


def states(model: sj.Decoder, cache: Any, text: np.ndarray, starts: list[int]) -> list[Any]:
    """The states behind so many tokens, in the host's memory."""
    found, state = [], sj.init_state(model, cache)
    for start in range(0, starts[-1] + 1, CHUNK):
        if start in starts:
            found.append(jax.tree.map(np.asarray, state))
        state = sj.read(model, state, text[:, start : start + CHUNK], CHUNK)
    return found


def seconds(model: sj.Decoder, state: Any, text: np.ndarray, start: int) -> float:
    """CPU seconds of a chunk, on average over those from here on."""
    state = jax.block_until_ready(jax.tree.map(jnp.array, state))
    began = time.process_time()
    for place in range(start, start + CHUNKS * CHUNK, CHUNK):
        state = sj.read(model, state, text[:, place : place + CHUNK], CHUNK)
    jax.block_until_ready(state)
    return (time.process_time() - began) / CHUNKS


def earlier(output: Path | None, layers: int, columns: list[str]) -> list[dict[str, str]]:
    """Rows that are there of the same measurement: with `--caches` only those that are named are measured again."""
    path = RESULTS / "caches/page_prefill.json" if output is None else output
    found = json.loads(path.read_text()) if path.exists() else {"rows": []}
    same = found.get("layers") == layers and all(list(row)[1:] == columns for row in found["rows"])
    return found["rows"] if same else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct: a Hugging Face folder or a GGUF file")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--around", type=int, nargs="+", default=[1024, 2048, 8192], help=f"multiples of {CHUNK}")
    parser.add_argument("--caches", nargs="+", default=CACHES, help="what is measured; other rows stay as they are")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where the JSON goes, if not to the results")
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    model.layers = nnx.List(list(model.layers)[: arguments.layers])
    model.config = model.config.replace(blocks=model.config.blocks[: arguments.layers])
    starts = [around - CHUNKS // 2 * CHUNK for around in arguments.around]
    length = starts[-1] + CHUNKS * CHUNK
    text = np.array([tokenizer.encode("\n".join(topics.values())[: 8 * length])[:length]], np.int32)
    dense = states(model, built("dense", model, length), text, starts)
    columns = [f"around {around:,}" for around in arguments.around]
    rows = earlier(arguments.output, arguments.layers, columns) or [{"cache": "dense"}]
    for name in arguments.caches:
        own = states(model, built(name, model, CAPACITY), text, starts)
        row = {"cache": name}
        for column, start, mine, theirs in zip(columns, starts, own, dense, strict=True):
            turns = [
                (seconds(model, mine, text, start), seconds(model, theirs, text, start))
                for _ in range(arguments.rounds)
            ]
            taken, base = zip(*turns, strict=True)
            row[column] = f"{statistics.median(taken):.2f} s ({median_ratio(taken, base):.2f})"
            rows[0].setdefault(column, f"{statistics.median(base):.2f} s (1.00)")
        by_name = {old["cache"]: old for old in rows} | {name: row}
        rows = list(by_name.values())
        print(row, flush=True)
        report("caches/page_prefill", rows, arguments.output, layers=arguments.layers)


if __name__ == "__main__":
    main()
