"""Compile time of a stream: CPU seconds of its first chunk, with every preset, and what the same takes again.

A chunk of 512 tokens is scored twice, in a process of its own for each row, without a compilation cache. The first time
compiles, the second time only runs; the difference is the compiler's. `layer by layer` is what `score` and `read` do:
equal layers share a program. With `--ways "one program"` all layers are in one, as in a decoding step; with `--decode`
two tokens are generated as well, whose program has all layers in it. The weights are drawn: time does not depend on
them. The shape is that of SmolLM2-135M (30 layers of 3 key heads). Presets by heads get gates that are drawn, and of a
layer 0 to 3 heads look far back, as many of all as is the preset's default: groups of equal sizes share a program, and
all layers what is not attention to what groups store.

Every preset is there that reads a stream as it is. Left out are those that need a file that is trained or measured with
a model (`cq`, `lococo`, `locret`, `matryoshka_kv`) or measure a prompt first (`cake`, `prefix_kv`, `zipvl`). So are
`minicache` and `xkv`, into which a stream that was read is compacted, and `hsa`, for models with a memory of their own,
which are read by one program. Rows of some caches are joined to those that the results have of others.

    python -m benchmarks.caches.compile_time
    python -m benchmarks.caches.compile_time --caches quest --layers 4 --decode
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import RESULTS, report
from streamjax.kv.presets.registry import Built
from streamjax.streaming.by_layer.layerwise import read_layerwise
from streamjax.streaming.scan import _score_chunks

WIDTH, KEY_HEADS, CAPACITY = 512, 3, 8192
LEFT_OUT = {"cq", "lococo", "locret", "matryoshka_kv", "cake", "prefix_kv", "zipvl", "minicache", "xkv", "hsa"}
CACHES = sorted(set(sj.kv.presets()) - LEFT_OUT)
WAYS = ("layer by layer", "one program")


def built(name: str, layers: int) -> Built:
    """A preset by its own defaults, but for a capacity that small machines have room for."""
    options: dict[str, Any] = {}
    known = sj.kv.presets()[name].options
    if "capacity" in known:
        options["capacity"] = CAPACITY
    if "heads" not in known:
        return sj.kv.preset(name, **options)
    gates = np.random.default_rng(0).random((layers, KEY_HEADS)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gates.json"
        file.write_text(json.dumps({"gates": gates}))
        return sj.kv.preset(name, heads=str(file), **options)


def measure(cache: str, way: str, layers: int, decode: bool) -> dict[str, float]:
    """CPU seconds of all threads of this process, which has compiled nothing of a stream yet."""
    config = sj.UniformConfig(
        vocab_size=49152, d_model=576, num_layers=layers, num_heads=9, num_kv_heads=KEY_HEADS, head_dim=64,
        mlp_dim=1536, tie_embeddings=True, rope=sj.RopeConfig(theta=100000.0),
    )  # fmt: skip
    shapes = jax.eval_shape(lambda key: sj.Decoder(config, key), jax.random.key(0))
    draw = np.random.default_rng(0)
    some = 0.02 * draw.standard_normal(1_000_003, np.float32)
    model = jax.tree.map(lambda x: jnp.asarray(np.resize(some, x.shape), x.dtype), shapes)
    state = sj.init_state(model, built(cache, layers))
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
        if decode:
            start = time.process_time()
            state, _ = sj.generate(model, state, nothing, max_new_tokens=2, sampler=greedy)
            jax.block_until_ready(state)
            found[f"decode {turn}"] = time.process_time() - start
    return found


def joined(rows: list[dict[str, Any]], output: Path | None, layers: int) -> list[dict[str, Any]]:
    """The rows, and those of other caches and ways that the results have of as many layers; by cache."""
    path = output or RESULTS / "caches/compile_time.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    old = before["rows"] if before.get("layers") == layers else []
    found = {(row["cache"], row["read"]): row for row in [*old, *rows]}
    return [found[key] for key in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:1])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--output", type=Path, help="where the JSON goes, if not to the results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments.layers, arguments.decode)))
        return
    rows = []
    for cache in arguments.caches:
        for way in arguments.ways:
            command = [sys.executable, "-m", "benchmarks.caches.compile_time", "--child", cache, way]
            command += ["--layers", str(arguments.layers), *["--decode"] * arguments.decode]
            environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
            child = subprocess.run(command, env=environment, capture_output=True, text=True)
            if child.returncode:
                raise RuntimeError(f"{cache}, {way}: {child.stderr.strip().splitlines()[-1]}")
            found = json.loads(child.stdout.splitlines()[-1])
            row = {
                "cache": cache,
                "read": way,
                "first chunk, CPU s": found["chunk first"],
                "the same again": found["chunk again"],
                "compile of a chunk": found["chunk first"] - found["chunk again"],
            }
            if arguments.decode:
                row["first decode, CPU s"] = found["decode first"]
                row["compile of decode"] = found["decode first"] - found["decode again"]
            rows.append(row)
            print(rows[-1], flush=True)
    report(
        "caches/compile_time",
        joined(rows, arguments.output, arguments.layers),
        arguments.output,
        layers=arguments.layers,
    )


if __name__ == "__main__":
    main()
