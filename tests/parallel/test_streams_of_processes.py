"""Streams of a model that lies over several processes: they score and write what one process does."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.config import RopeConfig
from tests.parallel.small_models import BATCH, CONFIG
from tests.processes import environments, wait_for

PROGRAM = """
import json, sys
import jax, numpy as np
from jax.experimental.multihost_utils import process_allgather
import streamjax as sj
from streamjax.parallel.mesh import make_mesh
from streamjax.parallel.multiprocess import join_processes

folder, axes, (name, options) = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
tokens = np.load(folder + "/tokens.npy")

def run(model):
    state = sj.init_state(model, sj.kv.preset(name, **options), len(tokens))
    state, nll = sj.score(model, state, tokens[:, :16], 8)
    state, written = sj.generate(
        model, state, tokens[:, 16:], max_new_tokens=6, key=jax.random.key(3), chunk_size=8
    )
    state, logits = sj.step(model, state, tokens[:, :1])
    return nll, written, logits, state.position

if axes:
    join_processes()
    mesh = make_mesh(**axes)
    assert mesh.devices.size == jax.process_count() > 1 == jax.local_device_count()
    with jax.set_mesh(mesh):
        model = sj.load(folder + "/model", mesh=mesh)
        whole = sum(x.size for x in jax.tree.leaves(model))
        here = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(model))
        found = [np.asarray(process_allgather(x, tiled=True)).tolist() for x in run(model)]
    found.append(here / whole)
else:
    found = [np.asarray(x).tolist() for x in run(sj.load(folder + "/model"))] + [1.0]
print(json.dumps(found), flush=True)
"""
LLAMA = CONFIG.replace(family="llama", qkv_bias=False, out_bias=False, qk_norm=False, rope=RopeConfig())
WINDOW = ("streaming_llm", {"sinks": 2, "window": 9})
DENSE = ("dense", {"capacity": 48})


def results(folder, axes, cache):
    """What each process found: costs, tokens, logits, positions, and the share of the model that it held."""
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(axes), json.dumps(cache)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    count = int(np.prod(list(axes.values())))
    processes = [subprocess.Popen(command, env=each, **pipes) for each in environments(count)]
    return [json.loads(said.splitlines()[-1]) for said in wait_for(processes, 540)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "cache"),
    [
        ({"tensor": 2}, WINDOW),
        ({"data": 2, "tensor": 2}, DENSE),
        ({"context": 2, "fsdp": 2}, DENSE),
        ({"fsdp": 2, "tensor": 2}, WINDOW),
    ],
)
def test_streams_over_processes_are_those_of_one(tmp_path, axes, cache):
    sj.save_hf(jax.jit(lambda: sj.Decoder(LLAMA, jax.random.key(0)))(), tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, LLAMA.vocab_size, (BATCH, 22), np.int32))
    ((nll, tokens, logits, positions, _),) = results(tmp_path, {}, cache)
    assert np.shape(tokens) == (BATCH, 6)
    for found in results(tmp_path, axes, cache):
        np.testing.assert_allclose(found[0], nll, atol=2e-5)
        np.testing.assert_array_equal(found[1], tokens)
        np.testing.assert_allclose(found[2], logits, atol=2e-5)
        np.testing.assert_array_equal(found[3], positions)
        split = axes.get("tensor", 1) * axes.get("fsdp", 1)
        assert 1 / split <= found[4] < 1.5 / split
