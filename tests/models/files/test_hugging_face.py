"""Reading and writing checkpoint folders: layouts, placement, memory, and every way that a folder can be wrong."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from streamjax.models import RopeConfig, UniformConfig, forward
from streamjax.models.files import safetensors_files
from streamjax.models.files.hugging_face import load_hf, save_hf
from streamjax.parallel.mesh import make_mesh
from streamjax.parallel.rules import partition_spec
from tests.architectures import tiny_config
from tests.covering import rest_slow
from tests.models.random_decoders import random_decoder

pytestmark = pytest.mark.quick
CONFIG = UniformConfig(
    vocab_size=64, d_model=32, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, tie_embeddings=True
)
GEMMA = CONFIG.replace(
    family="gemma3",
    windows=(4, None, 4, None, 4),
    norm_offset=1.0,
    qk_norm=True,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=32**0.5,
    attention_scale=8**-0.5,
    rope=RopeConfig(theta=1e6),
    local_rope=RopeConfig(),
)


def assert_same(actual, expected):
    assert actual.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module")
def model():
    return random_decoder(CONFIG)


@pytest.fixture
def folder(model, tmp_path):
    save_hf(model, tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Let `change` edit the dictionary of tensors of a single-file checkpoint."""
    file = folder / "model.safetensors"
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file)
    (folder / "checksums.json").unlink(missing_ok=True)


def test_shards_and_single_file_hold_the_same(model, tmp_path):
    save_hf(model, tmp_path, max_shard_size=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    assert sum((tmp_path / name).stat().st_size for name in files) >= index["metadata"]["total_size"]
    assert_same(load_hf(tmp_path), model)
    save_hf(model, tmp_path)
    assert [f.name for f in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same(load_hf(tmp_path), model)


def test_scan_layers_with_a_period_and_a_remainder(tmp_path):
    model = random_decoder(GEMMA)
    save_hf(model, tmp_path / "a")
    scanned = load_hf(tmp_path / "a", scan_layers=True)
    assert scanned.stacked_layers == 4
    for i in range(5):
        jax.tree.map(np.testing.assert_array_equal, scanned.layer(i), model.layers[i])
    save_hf(scanned, tmp_path / "b")
    assert_same(load_hf(tmp_path / "b"), load_hf(tmp_path / "a"))


@pytest.mark.covering
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_mesh(tmp_path, scan_layers, tie):
    config = CONFIG.replace(tie_embeddings=tie, num_layers=3)
    save_hf(random_decoder(config), tmp_path)
    mesh = make_mesh(fsdp=4, tensor=2)
    plain = load_hf(tmp_path, scan_layers=scan_layers)
    placed = load_hf(tmp_path, mesh=mesh, scan_layers=scan_layers)
    jax.tree.map(np.testing.assert_array_equal, placed, plain)
    projections = (placed.stack[0] if scan_layers else placed.layers[0]).mixer.projections
    for parameter in (placed.embedding, projections.qkv, projections.out):
        spec = partition_spec(parameter.axes, parameter[...].shape, mesh)
        assert parameter[...].sharding.is_equivalent_to(NamedSharding(mesh, spec), parameter[...].ndim)
    assert placed.embedding[...].addressable_shards[0].data.shape == (32, 8)
    assert projections.qkv[...].addressable_shards[0].data.shape[-4:] == (8, 1, 4, 8)


@pytest.mark.parametrize("case", rest_slow(["cohere2", "glm4", "olmo2"], "glm4", "olmo2"))
def test_channels_in_pairs_and_norms_over_all_heads_on_a_mesh(tmp_path, case, monkeypatch):
    model = random_decoder(tiny_config(case))
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    save_hf(model, tmp_path)
    assert_same(load_hf(tmp_path), model)
    monkeypatch.setattr(safetensors_files, "_BLOCK", 1)  # read in the smallest pieces
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = load_hf(tmp_path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, model)
    with jax.set_mesh(mesh):
        logits = forward(placed, tokens)
    np.testing.assert_allclose(logits, forward(model, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes(tmp_path, model, stored):
    save_hf(jax.tree.map(lambda x: x.astype(stored), model), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == np.dtype(stored).name
    loaded = load_hf(tmp_path)
    assert loaded.dtype == jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(stored)), loaded, model)
    half = load_hf(tmp_path, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}


@pytest.mark.parametrize("scan_layers", rest_slow([False, True], True))
def test_host_memory_is_about_one_tensor(tmp_path, scan_layers):
    config = UniformConfig(
        vocab_size=256, d_model=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=1536
    )
    model = random_decoder(config)
    largest, total = (measure(leaf.nbytes for leaf in jax.tree.leaves(model)) for measure in (max, sum))
    save_hf(model, tmp_path, max_shard_size=40_000_000)
    del model
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) > 100_000_000
    tracemalloc.start()
    try:
        load_hf(tmp_path, scan_layers=scan_layers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # On CPU the host's memory is the device's: what is not stacked stays where it was read to; of what is, JAX lets
    # go of a layer when it is called with the next one.
    assert peak < (3 * largest if scan_layers else total + largest), (peak, largest)


def test_known_buffers_are_skipped(folder, model):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    rewrite(folder, add)
    assert_same(load_hf(folder), model)


def test_masks_of_gpt_neox_are_skipped(tmp_path):
    config = CONFIG.replace(family="gpt_neox", num_kv_heads=4, norm="layer", norm_bias=True, parallel_residual=True)
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated_mlp": False, "activation": "gelu"}
    model = random_decoder(config.replace(**biases))
    save_hf(model, tmp_path)

    def add(tensors):
        for name in ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"):
            tensors[f"gpt_neox.layers.1.{name}"] = np.ones(4, np.float32)

    rewrite(tmp_path, add)
    assert_same(load_hf(tmp_path), model)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma3_prefixes_of_both_generations(tmp_path, prefix):
    model = random_decoder(GEMMA)
    save_hf(model, tmp_path)

    def rename(tensors):
        renamed = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    rewrite(tmp_path, rename)
    assert_same(load_hf(tmp_path), model)


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, value):
    return lambda tensors: tensors.update({name: value})


WRONG_TENSORS = {
    "missing": (drop("model.layers.1.mlp.up_proj.weight"), r"'model\.layers\.1\.mlp\.up_proj\.weight'.* missing"),
    "unexpected": (
        replace("model.layers.5.mlp.up_proj.weight", np.ones((2, 2), np.float32)),
        r"model\.safetensors: unexpected tensor 'model\.layers\.5\.mlp\.up_proj\.weight'",
    ),
    "bias nobody asked for": (
        replace("model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32)),
        r"unexpected tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'",
    ),
    "shape": (
        replace("model.layers.0.self_attn.k_proj.weight", np.ones((32, 32), np.float32)),
        r"model\.safetensors: tensor 'model\.layers\.0\.self_attn\.k_proj\.weight' has shape \[32, 32\].*\[16, 32\]",
    ),
    "transposed": (
        replace("model.layers.0.mlp.down_proj.weight", np.ones((48, 32), np.float32)),
        r"'model\.layers\.0\.mlp\.down_proj\.weight' has shape \[48, 32\].*\[32, 48\]",
    ),
    "quantised": (
        replace("model.layers.0.mlp.down_proj.weight", np.ones((32, 48), np.int8)),
        r"'model\.layers\.0\.mlp\.down_proj\.weight' has dtype I8",
    ),
    "tied head that differs": (
        replace("lm_head.weight", np.ones((64, 32), np.float32)),
        r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'.*tie_word_embeddings",
    ),
}


def one_line(error):
    return len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors(folder, case):
    change, message = WRONG_TENSORS[case]
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_hf(folder)
    assert one_line(error)
    assert str(folder) in str(error.value)


def test_every_truncation_is_noticed(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 4, 8, header // 2, header, header + 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged or truncated") as error:
            load_hf(folder)
        assert one_line(error)


def test_wrong_folders(folder, model, tmp_path):
    save_hf(model, tmp_path / "sharded", max_shard_size=20_000)
    sharded = tmp_path / "sharded"
    first = next(sharded.glob("model-00001*"))
    second = next(sharded.glob("model-00002*"))
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(ValueError, match=rf"{first.name}: this shard is missing"):
        load_hf(sharded)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=rf"{second.name}: tensor .* is also in {first.name}"):
        load_hf(sharded)
    first.write_bytes(content)
    index = sharded / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weights | {"model.norm.weight": first.name}}))
    with pytest.raises(ValueError, match=rf"{first.name}: tensor 'model\.norm\.weight' is missing, although"):
        load_hf(sharded)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../x.safetensors"}}))
    with pytest.raises(ValueError, match="outside of the folder"):
        load_hf(sharded)
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: no 'weight_map'"):
        load_hf(sharded)

    with pytest.raises(ValueError, match="no such folder"):
        load_hf(tmp_path / "nowhere")
    config = (folder / "config.json").read_text()
    for text, message in (("{", "not readable as JSON"), ("[1]", "expected a JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json: {message}") as error:
            load_hf(folder)
        assert one_line(error)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: this file is missing"):
        load_hf(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickle files can run code.*safe_serialization=True"):
        load_hf(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no weights: expected"):
        load_hf(folder)


def test_a_failed_save_leaves_the_old_checkpoint(folder, model):
    wrong = random_decoder(CONFIG.replace(qk_norm=True))
    with pytest.raises(ValueError, match=r"family 'llama' cannot express qk_norm = True.*qwen3"):
        save_hf(wrong, folder)
    assert_same(load_hf(folder), model)
