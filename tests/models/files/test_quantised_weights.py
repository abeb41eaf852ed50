"""Blocks of MXFP4 and FP8: against transformers' dequantisation, by hand, loaded whole and in parts, and refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streamjax as sj
from streamjax.models.families import read_config
from streamjax.models.families.config_fields import Quantisation
from streamjax.models.files.quantised_weights import dequantised
from streamjax.models.files.safetensors_files import list_tensors
from streamjax.parallel.mesh import make_mesh
from tests.models import transformers_peers as peers

MXFP4 = Quantisation("mxfp4")


def stored(folder, **tensors):
    folder.mkdir(exist_ok=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    return list_tensors(folder)


def mxfp4(experts, rows, groups, seed=0):
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8, generator=random)
    return {
        "w_blocks": blocks,
        "w_scales": torch.randint(1, 250, blocks.shape[:3], dtype=torch.uint8, generator=random),
    }


@settings(max_examples=10, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)), seed=st.integers(0, 99), data=st.data()
)
def test_mxfp4_is_what_transformers_makes_of_it(tmp_path_factory, shape, seed, data):
    tensors = mxfp4(*shape, seed)
    found = dequantised(stored(tmp_path_factory.mktemp("m"), **tensors), MXFP4)
    expected = convert_moe_packed_tensors(tensors["w_blocks"], tensors["w_scales"], dtype=torch.float32).numpy()
    assert list(found) == ["w"]
    assert found["w"].shape == expected.shape
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    np.testing.assert_array_equal(found["w"].read_rows(start, stop), expected[start:stop])


def test_mxfp4_by_hand(tmp_path):
    """0x2F: the first number is 15, -6, the second 2, 1; with exponent 127 + 3 they are -48 and 8."""
    blocks = torch.full((1, 1, 1, 16), 0x2F, dtype=torch.uint8)
    tensors = stored(tmp_path, w_blocks=blocks, w_scales=torch.tensor([[[130]]], dtype=torch.uint8))
    values = dequantised(tensors, MXFP4)["w"].read_rows(0, 1)
    np.testing.assert_array_equal(values, np.tile([-48.0, 8.0], 16).reshape(1, 32, 1))


def fp8(shape, block, scale_dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random).to(torch.float8_e4m3fn)
    grid = (*shape[:-2], *(-(-n // size) for n, size in zip(shape[-2:], block, strict=True)))
    return weight, (0.5 + torch.rand(grid, generator=random)).to(scale_dtype)


@pytest.mark.parametrize("shape", [(12, 8), (3, 8, 4)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_fp8_is_what_transformers_makes_of_it(tmp_path, shape, kind):
    weight, scales = fp8(shape, (4, 2), kind)
    tensors = stored(
        tmp_path, **{"a.weight": weight, "a.weight_scale_inv": scales, "a.activation_scale": torch.ones(1)}
    )
    found = dequantised(tensors, Quantisation("fp8", (4, 2)))
    assert list(found) == ["a.weight"]
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32).numpy()
    for start, stop in [(0, shape[0]), (1, 3), (shape[0] - 1, shape[0])]:
        np.testing.assert_array_equal(found["a.weight"].read_rows(start, stop), expected[start:stop])


@settings(max_examples=10, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    data=st.data(),
)
def test_fp8_blocks_that_do_not_divide_the_weight(tmp_path_factory, shape, block, data):
    """Number by number, in any range of rows."""
    weight, scales = fp8(shape, block)
    tensors = stored(tmp_path_factory.mktemp("f"), weight=weight, weight_scale_inv=scales)
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    rows = dequantised(tensors, Quantisation("fp8", block))["weight"].read_rows(start, stop)
    for i, j in np.ndindex(stop - start, shape[1]):
        factor = scales[(start + i) // block[0], j // block[1]]
        assert rows[i, j] == np.float32(weight[start + i, j].float()) * np.float32(factor)


def test_one_factor_a_tensor(tmp_path):
    weight, _ = fp8((3, 4), (1, 1))
    for scale in (torch.tensor(0.25), torch.tensor([0.25])):
        tensors = stored(tmp_path, weight=weight, weight_scale_inv=scale)
        found = dequantised(tensors, Quantisation("fp8"))["weight"].read_rows(1, 3)
        np.testing.assert_array_equal(found, 0.25 * weight[1:].float().numpy())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama whose projections are in blocks of FP8, and the same one with the numbers that these are."""
    plain, packed = (tmp_path_factory.mktemp(name) for name in ("plain", "packed"))
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = hf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=None)
    peers.write(peers.peer(config), plain)
    tensors, blocks = load_file(plain / "model.safetensors"), {}
    for name, x in list(tensors.items()):
        if "_proj" in name:
            scale = torch.rand(-(-x.shape[0] // 6), -(-x.shape[1] // 6)) + 0.1
            wide = scale.repeat_interleave(6, 0).repeat_interleave(6, 1)[: x.shape[0], : x.shape[1]]
            blocks[name] = (x / wide).to(torch.float8_e4m3fn)
            blocks[f"{name}_scale_inv"] = scale
            tensors[name] = blocks[name].float() * wide
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file({**tensors, **blocks}, packed / "model.safetensors", {"format": "pt"})
    values = json.loads((plain / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [6, 6], "fmt": "e4m3"}
    (packed / "config.json").write_text(json.dumps(values))
    return plain, packed


@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 2, "data": 2}], ids=["whole", "sharded"])
def test_a_model_in_blocks_is_the_model_of_their_numbers(folders, axes, tmp_path):
    """Loaded on one device and on a mesh; what is saved are plain weights."""
    plain, packed = folders
    mesh = None if axes is None else make_mesh(**axes)
    expected, found = sj.load(plain), sj.load(packed, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(found), jax.tree.leaves(expected))
    sj.save_hf(found, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(sj.load(tmp_path / "saved")), jax.tree.leaves(expected))
    assert expected.dtype == jnp.float32


@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 2, "data": 2}], ids=["whole", "sharded"])
def test_gpt_oss_in_blocks(tmp_path, axes):
    """As it is published: the experts' projections in MXFP4, their biases and all else plain."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "pad_token_id": None}
    config = hf.GptOssConfig(**sizes, **experts, num_attention_heads=4, num_key_value_heads=2)
    plain = peers.write(peers.peer(config), tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors")
    packed = dict(tensors)
    for name, x in tensors.items():
        if name.endswith("_proj"):
            random = mxfp4(x.shape[0], x.shape[2], x.shape[1] // 32)
            packed |= {f"{name}_blocks": random["w_blocks"], f"{name}_scales": random["w_scales"].clamp(115, 124)}
            del packed[name]
            both = packed[f"{name}_blocks"], packed[f"{name}_scales"]
            tensors[name] = convert_moe_packed_tensors(*both, dtype=torch.float32)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    (tmp_path / "packed").mkdir()
    save_file(packed, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    values = json.loads((plain / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(values))
    found = sj.load(tmp_path / "packed", mesh=None if axes is None else make_mesh(**axes))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(found), jax.tree.leaves(sj.load(plain)))
    if axes is None:
        theirs = peers.reload(plain)
        tokens = peers.tokens_for(theirs, 20)
        np.testing.assert_allclose(sj.forward(found, tokens), peers.logits_of(theirs, tokens), atol=2e-4, rtol=1e-5)


def test_blocks_without_what_belongs_to_them_are_one_line(folders, tmp_path):
    _, packed = folders
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    for change, message in {
        "without": f"tensor '{name}' has dtype F8_E4M3; streamjax reads",
        "shape": rf"'{name}_scale_inv' is F32 \[5, 3\]; '{name}' asks for .* \[4, 3\]",
    }.items():
        scales = {} if change == "without" else {f"{name}_scale_inv": torch.ones(5, 3)}
        some = {key: x for key, x in tensors.items() if key != f"{name}_scale_inv"}
        save_file({**some, **scales}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message) as error:
            sj.load(tmp_path)
        assert "\n" not in str(error.value)
    wrong = mxfp4(2, 3, 2) | {"w_scales": torch.ones((2, 3, 3), dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"'w_scales' is U8 \[2, 3, 3\]; 'w_blocks' asks for U8 \[2, 3, 2\]"):
        dequantised(stored(tmp_path / "m", **wrong), MXFP4)
    with pytest.raises(ValueError, match=r"'w_blocks' is F32 of shape \[2\]; MXFP4 blocks are U8"):
        dequantised(stored(tmp_path / "m", w_blocks=torch.ones(2), w_scales=torch.ones(2)), MXFP4)


def test_a_file_that_becomes_shorter_is_one_line(tmp_path):
    tensors = stored(tmp_path, **mxfp4(2, 3, 2))
    found = dequantised(tensors, MXFP4)["w"]
    far = dataclasses.replace(found, stored=dataclasses.replace(found.stored, offset=10**6))
    with pytest.raises(ValueError, match="has become shorter while tensor 'w_blocks' was read"):
        far.read_rows(0, 1)


BASE = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'; streamjax dequantises mxfp4 and fp8"),
        ({"bits": 4}, "quant_method None"),
        ({"quant_method": 8}, "'quant_method' is 8; expected str"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size' is \[128\]; expected two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "expected two sizes"),
        (4, "'quantization_config' is 4; expected dict"),
    ],
)
def test_other_kinds_are_refused(says, message):
    values = {**BASE, "quantization_config": says}
    with pytest.raises(ValueError, match=message):
        read_config(values)
