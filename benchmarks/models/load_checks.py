"""Loading a model with and without comparing its files with their checksums (`STREAMJAX_VERIFY=0`).

Each folder is loaded in turn with the check and without it, from the system's file cache. The model has the shape of
SmolLM2-135M and drawn weights in bfloat16. `check` is the median difference of a turn. Seconds of the CPU are of all
threads: files are hashed side by side.

    python -m benchmarks.models.load_checks
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from benchmarks.reporting import report
from streamjax.checkpoints.manifests import VERIFY

LAYOUTS = {"Hugging Face": sj.save_hf, "safetensors, our own": sj.save_safetensors, "Orbax": sj.save}


def drawn_model() -> sj.Decoder:
    config = sj.UniformConfig(
        vocab_size=49152, d_model=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536,
        tie_embeddings=True, rope=sj.RopeConfig(theta=100000.0),
    )  # fmt: skip
    shapes = jax.eval_shape(lambda key: sj.Decoder(config, key, dtype=jnp.bfloat16), jax.random.key(0))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape, np.float32), x.dtype), shapes)


def load_seconds(folder: Path, check: bool) -> tuple[float, float]:
    """Seconds on the clock and of the CPU."""
    os.environ[VERIFY] = "1" if check else "0"
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(jax.tree.leaves(sj.load(folder, dtype=jnp.bfloat16)))
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    rows = []
    with tempfile.TemporaryDirectory() as root:
        model = drawn_model()
        for name, save in LAYOUTS.items():
            save(model, Path(root) / name)
            size = sum(file.stat().st_size for file in (Path(root) / name).rglob("*") if file.is_file()) / 1e9
            turns = [
                (load_seconds(Path(root) / name, False), load_seconds(Path(root) / name, True))
                for _ in range(repeats + 1)
            ]
            without = statistics.median(plain[0] for plain, _ in turns[1:])
            check, cpu = (statistics.median(both[i] - plain[i] for plain, both in turns[1:]) for i in (0, 1))
            rows.append(
                {
                    "layout": name,
                    "GB": size,
                    "load without, s": without,
                    "check, s": check,
                    "check, s a GB": check / size,
                    "check, CPU s a GB": cpu / size,
                }
            )
    report("models/load_checks", rows)


if __name__ == "__main__":
    main()
