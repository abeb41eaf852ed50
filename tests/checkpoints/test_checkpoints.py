"""Orbax checkpoints: bit for bit, whole or not at all, and onto other dtypes, layouts and devices."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.checkpoints import RunCheckpoints, restore_pytree, save_pytree
from streamjax.models import RopeConfig, UniformConfig, stack_layers
from streamjax.parallel.mesh import make_mesh
from tests.streaming.tiny_models import build

CONFIG = UniformConfig(
    vocab_size=64, d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, windows=(4, None) * 2,
    rope=RopeConfig(theta=5e5), local_rope=RopeConfig(theta=1e4), eos_token_ids=(1, 2),
)  # fmt: skip
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture
def saved(model, tmp_path):
    sj.save(model, tmp_path / "model")
    return tmp_path / "model"


def same_bits(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def test_every_kind_of_array_comes_back_bit_for_bit(tmp_path):
    tree = {
        "uint32": jnp.array([0, 2**31, 2**32 - 1], jnp.uint32),
        "bool": (jnp.array([[True, False]]), jnp.zeros((), bool)),
        "floats": [jnp.array([np.nan, -0.0, np.inf, 1e-45], jnp.float32), jnp.array([1.5, -2], jnp.bfloat16)],
        "int8": jnp.array([-128, 127], jnp.int8),
        "empty": jnp.zeros((2, 0, 3), jnp.uint32),
        "none": None,
    }
    save_pytree(tree, tmp_path / "tree")
    found = restore_pytree(jax.tree.map(jnp.zeros_like, tree), tmp_path / "tree")
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert same_bits(found, tree)


def test_a_model_comes_back_with_its_configuration(model, saved):
    found = sj.load(saved)
    assert found.config == CONFIG.expand()
    assert same_bits(found, model)
    np.testing.assert_array_equal(sj.forward(found, TOKENS), sj.forward(model, TOKENS))


def test_dtype_and_layout_are_chosen_at_loading(model, saved):
    half = sj.load(saved, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert same_bits(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model))
    stacked = sj.load(saved, scan_layers=True)
    assert same_bits(stacked, stack_layers(model))
    sj.save(stacked, saved)
    assert len(sj.load(saved).stack) == 2
    assert same_bits(sj.load(saved, scan_layers=False), model)


def test_a_model_is_loaded_in_parts_onto_a_mesh(model, saved):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    found = sj.load(saved, mesh=mesh)
    qkv = found.layers[0].mixer.projections.qkv[...]
    assert {shard.data.shape for shard in qkv.addressable_shards} == {(16, 1, 4, 8)}
    assert same_bits(found, model)
    sj.save(found, saved)
    assert same_bits(sj.load(saved), model)


CONTINUE = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import numpy as np
import streamjax as sj
folder = sys.argv[1]
model = sj.load(folder + "/model")
caches = {"sinks": sj.kv.preset("streaming_llm", sinks=2, window=6)}
tokens = np.arange(24, dtype=np.int32).reshape(2, 12)[:, ::-1].copy()
for name, cache in caches.items():
    state = sj.load_stream(f"{folder}/{name}", sj.init_state(model, cache, batch_size=2))
    state, logits = sj.step(model, state, tokens)
    np.savez(f"{folder}/{name}.npz", logits=logits, position=state.position)
"""


@pytest.mark.slow
def test_a_stream_goes_on_bit_for_bit_in_a_new_process(tmp_path):
    model = build(CONFIG.replace(num_layers=2, windows=(4, None)))
    sj.save(model, tmp_path / "model")
    caches = {"sinks": sj.kv.preset("streaming_llm", sinks=2, window=6)}
    expected = {}
    for name, cache in caches.items():
        state = sj.init_state(model, cache, batch_size=2, position=2**32 - 5)
        state, _ = sj.step(model, state, TOKENS)
        sj.save_stream(state, tmp_path / name)
        _, expected[name] = sj.step(model, state, TOKENS[:, ::-1].copy())
    subprocess.run([sys.executable, "-c", CONTINUE, str(tmp_path)], check=True)
    for name in caches:
        found = np.load(tmp_path / f"{name}.npz")
        assert found["logits"].tobytes() == np.asarray(expected[name]).tobytes()
        assert found["position"].tolist() == [19, 19]


def test_a_stream_of_another_cache_is_refused(model, tmp_path):
    state = sj.init_state(model, sj.kv.preset("window", window=6))
    sj.save_stream(state, tmp_path / "stream")
    other = sj.init_state(model, sj.kv.preset("window", window=8))
    with pytest.raises(ValueError, match=r"saved with .*6.* in layer 1, which is .*8.* here: use that cache"):
        sj.load_stream(tmp_path / "stream", other)
    with pytest.raises(ValueError, match=r"array layers.* is .* and .* is expected"):
        sj.load_stream(tmp_path / "stream", sj.init_state(model, sj.kv.preset("window", window=6), batch_size=2))


def test_errors_name_what_is_wrong(model, saved, tmp_path):
    def fails(message, function, *arguments):
        with pytest.raises(ValueError, match=message) as error:
            function(*arguments)
        assert "\n" not in str(error.value)

    fails("no model at .*nowhere: neither config.json", sj.load, tmp_path / "nowhere")
    save_pytree({"a": jnp.ones((2, 3))}, tmp_path / "tree")
    fails("holds no model, but a pytree", sj.load, tmp_path / "tree")
    fails("array b is missing", restore_pytree, {"a": jnp.ones((2, 3)), "b": jnp.ones(1)}, tmp_path / "tree")
    fails("array a has no place here", restore_pytree, {}, tmp_path / "tree")
    fails(
        r"array a is float32\[2, 3\], and float32\[3, 2\] is",
        restore_pytree,
        {"a": jnp.ones((3, 2))},
        tmp_path / "tree",
    )
    save_pytree({"a": jnp.ones(2)}, tmp_path / "stream", {"kind": "stream", "caches": 3})
    fails(
        "does not say with which caches",
        sj.load_stream,
        tmp_path / "stream",
        sj.init_state(model, sj.kv.preset("window", window=6)),
    )
    fails("and bfloat16", restore_pytree, {"a": jnp.ones((2, 3), jnp.bfloat16)}, tmp_path / "tree")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    fails("exists and is no checkpoint: choose another path", sj.save, model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"
    shutil.move(saved, tmp_path / "run" / "model")
    fails("run holds no model, but .*model may: load that", sj.load, tmp_path / "run")


def test_an_interrupted_save_leaves_the_earlier_checkpoint(model, saved, monkeypatch):
    changed = jax.tree.map(lambda x: x + 1, model)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the power went")))
    with pytest.raises(OSError, match="the power went"):
        sj.save(changed, saved)
    monkeypatch.undo()
    assert same_bits(sj.load(saved), model)
    sj.save(changed, saved)
    assert same_bits(sj.load(saved), changed)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_run_keeps_its_newest_checkpoints(tmp_path):
    tree = {"x": jnp.arange(3.0)}
    checkpoints = RunCheckpoints(tmp_path / "run", keep=2)
    assert checkpoints.latest_step is None
    for step in (5, 10, 15, 15):
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x + s, tree), {"place": {"step": step}})
    checkpoints.close()
    checkpoints = RunCheckpoints(tmp_path / "run", keep=2)
    assert checkpoints.latest_step == 15
    found, about = checkpoints.restore(10, tree)
    np.testing.assert_array_equal(found["x"], [10.0, 11.0, 12.0])
    assert about["place"] == {"step": 10}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["10", "15"]
