"""Loading holds the weights once: measured on a process of its own, whose memory nothing else moves."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import streamjax as sj
from tests.covering import rest_slow

WIDE = {
    "vocab_size": 200_000,
    "d_model": 128,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 64,
    "mlp_dim": 64,
    "tie_embeddings": True,
}
CHILD = """
import json, sys
from pathlib import Path
import jax
import streamjax as sj

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

small, large, dtype = sys.argv[1:]
jax.block_until_ready(jax.tree.leaves(sj.load(small, dtype=dtype)))  # imports and first uses are not what is measured
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
weights = jax.block_until_ready(jax.tree.leaves(sj.load(large, dtype=dtype)))
peak = resident("VmHWM")
print(json.dumps({"over": peak - before, "weights": sum(leaf.nbytes for leaf in weights)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of resident memory to be set back here")
@pytest.mark.parametrize("dtype", rest_slow(["float32", "bfloat16"], "bfloat16"))
def test_a_large_tensor_is_held_once(tmp_path, dtype):
    for name, vocabulary in (("small", 300), ("large", WIDE["vocab_size"])):
        config = sj.UniformConfig(**{**WIDE, "vocab_size": vocabulary})
        sj.save_hf(sj.Decoder(config, jax.random.key(0), dtype=jnp.float32), tmp_path / name)
    command = [sys.executable, "-c", CHILD, tmp_path / "small", tmp_path / "large", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    found = json.loads(done.stdout)
    assert found["weights"] > 100e6 / (1 if dtype == "float32" else 2)
    assert found["over"] < found["weights"] + 25e6, found
