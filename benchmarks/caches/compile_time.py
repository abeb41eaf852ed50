"""Compile time of a stream: CPU seconds of its first chunk and of its first decoded tokens, and what they take again.

A chunk of 512 tokens is scored and two tokens are generated, twice, in a process of its own for each row, without a
compilation cache. The first time compiles, the second time only runs; the difference is the compiler's. `one program`
has all layers in it, which is what every chunk of a stream was read by before; `layer by layer` is what `score` and
`read` do: equal layers share a program. The weights are drawn: time does not depend on them. The shape is that of
SmolLM2-135M (30 layers). The table on the page is of `--caches dense streaming_llm`; caches of pages take minutes.

    python -m benchmarks.caches.compile_time
    python -m benchmarks.caches.compile_time --caches quest --layers 30
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import report
from streamjax.streaming.layerwise import read_layerwise
from streamjax.streaming.scan import _score_chunks

WIDTH = 512
CACHES = {
    "dense": {"capacity": 4096},
    "streaming_llm": {},
    "quest": {"capacity": 4096},
    "hip": {"capacity": 4096},
    "inf_llm": {"capacity": 4096, "window": 1024},
    "retro_infer": {"capacity": 8192},
    "sentence_kv": {"capacity": 4096},
}
WAYS = ("one program", "layer by layer")


def measure(cache: str, way: str, layers: int) -> dict[str, float]:
    """CPU seconds of all threads of this process, which has compiled nothing of a stream yet."""
    config = sj.UniformConfig(
        vocab_size=49152, d_model=576, num_layers=layers, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
        tie_embeddings=True, rope=sj.RopeConfig(theta=100000.0),
    )  # fmt: skip
    shapes = jax.eval_shape(lambda key: sj.Decoder(config, key), jax.random.key(0))
    draw = np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(0.02 * draw.standard_normal(x.shape, np.float32), x.dtype), shapes)
    state = sj.init_state(model, sj.kv.preset(cache, **CACHES[cache]))
    tokens = draw.integers(0, config.vocab_size, (1, 1, WIDTH)).astype(np.int32)
    count = np.full((1, 1), WIDTH, np.int32)
    nothing, greedy = np.zeros((1, 0), np.int32), sj.Sampler(temperature=0)
    found = {}
    for turn in ("first", "again"):
        jax.block_until_ready(state)
        start = time.process_time()
        if way == "one program":
            state, nats = _score_chunks(model, state, tokens, count)
        else:
            state, nats = read_layerwise(model, state, tokens, count, scored=True)
        jax.block_until_ready((state, nats))
        found[f"chunk {turn}"] = time.process_time() - start
        start = time.process_time()
        state, _ = sj.generate(model, state, nothing, max_new_tokens=2, sampler=greedy)
        jax.block_until_ready(state)
        found[f"decode {turn}"] = time.process_time() - start
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments.layers)))
        return
    rows = []
    for cache in arguments.caches:
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.caches.compile_time", "--child", cache, way]
            command += ["--layers", str(arguments.layers)]
            environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
            child = subprocess.run(command, env=environment, capture_output=True, text=True)
            if child.returncode:
                raise RuntimeError(f"{cache}, {way}: {child.stderr.strip().splitlines()[-1]}")
            found = json.loads(child.stdout.splitlines()[-1])
            rows.append(
                {
                    "cache": cache,
                    "read": way,
                    "first chunk, CPU s": found["chunk first"],
                    "the same again": found["chunk again"],
                    "compile of a chunk": found["chunk first"] - found["chunk again"],
                    "first decode, CPU s": found["decode first"],
                    "compile of decode": found["decode first"] - found["decode again"],
                }
            )
            print(rows[-1], flush=True)
    report("caches/compile_time", rows, layers=arguments.layers)


if __name__ == "__main__":
    main()
