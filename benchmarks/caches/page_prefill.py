"""Reading on behind what is cached: every preset that chooses what it reads, beside dense attention.

    python -m benchmarks.caches.page_prefill --model=FOLDER    # 2 cores: some 8 minutes

The first layers of SmolLM2-135M-Instruct in float32 read the text of Python's own help topics (`pydoc_data.topics`) in
chunks of 512. Of each preset the chunk behind 1,024, 2,048 and 8,192 tokens is timed, compiled, in CPU seconds of all
threads; the ratio is to the same chunk under `dense`, and below 1 the preset is faster. Presets have their own defaults
and room for 16,384 tokens. Where every token chooses for itself (`quest`, `sentence_kv`, `dhsa`, `block=1`), 64
neighbours gather together what any of them chose; with `block=64` they choose together. `inf_llm` holds a window of
4,096 tokens and notes how much attention each of them gets, which costs their logits once more. `retro_infer` reads all
of its open segment, here of 2,048 tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
from flax import nnx

import streamjax as sj
from benchmarks.reporting import report

CAPACITY, CHUNK = 16384, 512
CACHES = (
    "streaming_llm",
    "quest",
    "quest:block=64",
    "hip",
    "inf_llm",
    "sentence_kv:ends=30+198",  # the full stop and the line break in this vocabulary
    "dhsa",
    "retro_infer:segment=2048",
    "retro_infer:segment=2048,block=1",
)


def built(word: str) -> sj.kv.Cache:
    """A preset with its own defaults, and room for all that is read where it keeps everything."""
    name, options = sj.kv.parse_preset(word)
    if "capacity" in sj.kv.presets()[name].options:
        options.setdefault("capacity", CAPACITY)
    return sj.kv.preset(name, **options)  # type: ignore[return-value]


def chunks(model: sj.Decoder, cache: sj.kv.Cache, text: np.ndarray, behind: list[int], repeats: int) -> list[float]:
    """CPU seconds of the chunks behind so many tokens: the least of several readings."""
    best = [float("inf")] * len(behind)
    for _ in range(repeats):
        state = sj.init_state(model, cache)
        for start in range(0, behind[-1] + CHUNK, CHUNK):
            jax.block_until_ready(state)
            began = time.process_time()
            state = sj.read(model, state, text[:, start : start + CHUNK], CHUNK)
            jax.block_until_ready(state)
            if start in behind:
                place = behind.index(start)
                best[place] = min(best[place], time.process_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--behind", type=int, nargs="+", default=[1024, 2048, 8192], help=f"multiples of {CHUNK}")
    parser.add_argument("--caches", nargs="+", default=CACHES)
    parser.add_argument("--repeats", type=int, default=1, help="readings; the least counts")
    parser.add_argument("--output", type=Path, help="where the JSON goes, if not to the results")
    arguments = parser.parse_args()
    model, tokenizer = sj.load(arguments.model), sj.load_tokenizer(arguments.model)
    model.layers = nnx.List(list(model.layers)[: arguments.layers])
    model.config = model.config.replace(blocks=model.config.blocks[: arguments.layers])
    length = arguments.behind[-1] + CHUNK
    text = np.array([tokenizer.encode("\n".join(topics.values()))[:length]], np.int32)
    rows, dense = [], None
    for name in ("dense", *arguments.caches):
        cache = sj.kv.preset("dense", capacity=length) if name == "dense" else built(name)
        seconds = chunks(model, cache, text, arguments.behind, arguments.repeats)
        dense = dense or seconds
        ratios = (f"{mine:.2f} s ({mine / base:.2f})" for mine, base in zip(seconds, dense, strict=True))
        rows.append({"cache": name, **dict(zip((f"behind {n:,}" for n in arguments.behind), ratios, strict=True))})
        print(rows[-1], flush=True)
        report("caches/page_prefill", rows, arguments.output, layers=arguments.layers)


if __name__ == "__main__":
    main()
