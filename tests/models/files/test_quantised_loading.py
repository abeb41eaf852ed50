"""Models that are quantised as they are loaded, and quantised models on disk."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import streamjax as sj
from streamjax.models.quantisation import QuantisedKernel
from streamjax.models.quantising import quantised_model, weights_of
from streamjax.parallel.mesh import make_mesh
from tests.gguf_files import write_gguf
from tests.models.files.test_loading_memory import WIDE
from tests.models.random_decoders import random_decoder

pytestmark = pytest.mark.quick
KINDS = ("int8", "int4")
CONFIG = sj.UniformConfig(vocab_size=64, d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48)


def assert_same(actual, expected):
    assert actual.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied"])
def model(request):
    return random_decoder(CONFIG.replace(tie_embeddings=request.param))


@pytest.mark.covering
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("save", [sj.save_hf, sj.save_safetensors, sj.save])
@pytest.mark.parametrize("weights", KINDS)
def test_kernels_are_quantised_as_they_are_read(model, weights, save, scan_layers, tmp_path):
    save(model, tmp_path)
    found = sj.load(tmp_path, weights=weights, scan_layers=scan_layers)
    assert weights_of(found) == weights
    assert len(found.stack) == scan_layers
    assert isinstance(found.layer(1).mlp.up, QuantisedKernel)
    expected = quantised_model(model, weights)
    assert_same(found, sj.models.stack_layers(expected) if scan_layers else expected)


@pytest.mark.covering("save")
@pytest.mark.parametrize("save", [sj.save_hf, sj.save_safetensors, sj.save])
def test_a_mesh_has_parts_of_codes_and_scales(model, save, tmp_path):
    save(model, tmp_path)
    found = sj.load(tmp_path, weights="int4", mesh=make_mesh(tensor=2, fsdp=4))
    up = found.layers[0].mlp.up
    shapes = [x.get_value().addressable_shards[0].data.shape for x in (up.codes, up.offsets, up.scales)]
    assert shapes == [(4, 2, 24), (1, 2, 24), (1, 2, 24)]
    assert_same(found, quantised_model(model, "int4"))


@pytest.mark.covering
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("save", [sj.save_safetensors, sj.save])
@pytest.mark.parametrize("weights", KINDS)
def test_a_quantised_model_is_saved_and_loaded_bit_for_bit(model, weights, save, scan_layers, tmp_path):
    quantised = quantised_model(model, weights)
    save(sj.models.stack_layers(quantised) if scan_layers else quantised, tmp_path)
    for asked in (None, weights):
        assert_same(sj.load(tmp_path, scan_layers=False, weights=asked), quantised)
    other = "int4" if weights == "int8" else "int8"
    with pytest.raises(ValueError, match=f"the weights are {weights}, and {other} is asked for") as error:
        sj.load(tmp_path, weights=other)
    assert "\n" not in str(error.value)


def test_hugging_face_folders_have_no_quantised_weights(model, tmp_path):
    with pytest.raises(ValueError, match=r"weights are int8: .* streamjax.save or save_safetensors"):
        sj.save_hf(quantised_model(model, "int8"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("save", [sj.save_hf, sj.save_safetensors, sj.save])
def test_a_wrong_kind_is_one_line(model, save, tmp_path):
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"^weights is 'int5': choose from int8, int4, or None$"):
        sj.load(tmp_path, weights="int5")


def test_an_axis_without_groups_is_refused_before_anything_is_read(tmp_path):
    sj.save_hf(random_decoder(CONFIG.replace(mlp_dim=44)), tmp_path)
    with pytest.raises(ValueError, match=r"weights is 'int4', and layers.0.mlp.down: .* an axis of 44"):
        sj.load(tmp_path, weights="int4")
    assert weights_of(sj.load(tmp_path, weights="int8")) == "int8"


@pytest.mark.parametrize(
    ("change", "told"), [("dtype", "has dtype F32; of int4"), ("shape", "has shape"), ("kind", "field 'weights'")]
)
def test_damage_of_a_saved_quantised_model_is_named(model, change, told, tmp_path):
    sj.save_safetensors(quantised_model(model, "int4"), tmp_path)
    (tmp_path / "checksums.json").unlink()
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = dict(load_file(file))
    name = "layers.0.mlp.up.codes"
    if change == "kind":
        config.write_text(json.dumps({**json.loads(config.read_text()), "weights": "int9"}))
    else:
        tensors[name] = tensors[name].astype(np.float32) if change == "dtype" else tensors[name][:8]
        save_file(tensors, file)
    with pytest.raises(ValueError, match=told) as error:
        sj.load(tmp_path)
    assert "\n" not in str(error.value)


def test_gguf_of_four_bits_keeps_its_weights(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (64, 64), "output_norm": (64,)}
    for layer in range(2):
        block = {"attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64)}
        block |= {"attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    tensors = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    sizes = {"block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
    kinds = {name: gguf.GGMLQuantizationType.Q4_1 for name, x in tensors.items() if x.ndim > 1}
    file = write_gguf(tmp_path / "tiny.gguf", "llama", {**sizes, "rope.dimension_count": 16}, tensors, kinds)
    expected, found = sj.load(file), sj.load(file, weights="int4")
    assert weights_of(found) == "int4"
    for name in ("up", "down"):
        kept, exact = (getattr(model.layers[1].mlp, name)[...].astype(jnp.float32) for model in (found, expected))
        assert jnp.square(kept - exact).mean() < 1e-3 * jnp.square(exact).mean()  # four bits anew: 7e-3
    assert jax.eval_shape(sj.forward, found, jnp.arange(20)[None]).shape == (1, 20, 64)


CHILD = """
import json, sys
from pathlib import Path
import jax
import streamjax as sj

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

small, large, weights = sys.argv[1:]
jax.block_until_ready(jax.tree.leaves(sj.load(small, weights=weights)))
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
leaves = jax.block_until_ready(jax.tree.leaves(sj.load(large, weights=weights)))
print(json.dumps({"over": resident("VmHWM") - before, "weights": sum(leaf.nbytes for leaf in leaves)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of resident memory to be set back here")
@pytest.mark.parametrize("save", [sj.save_hf])
def test_memory_holds_the_quantised_weights_once(tmp_path, save):
    for name, vocabulary in (("small", 300), ("large", WIDE["vocab_size"])):
        config = sj.UniformConfig(**{**WIDE, "vocab_size": vocabulary})
        save(sj.Decoder(config, jax.random.key(0), dtype=jnp.float32), tmp_path / name)
    command = [sys.executable, "-c", CHILD, tmp_path / "small", tmp_path / "large", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    found = json.loads(done.stdout)
    assert 25e6 < found["weights"] < 30e6
    assert found["over"] < found["weights"] + 25e6, found
