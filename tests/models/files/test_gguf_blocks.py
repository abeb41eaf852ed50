"""Weights in blocks: every kind that the gguf package dequantises, whole, by rows, and in another order of rows."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.checkpoints.gguf_header import read_header
from streamjax.models.files.gguf.weights import DequantisedTensor, can_dequantise
from streamjax.parallel.mesh import make_mesh
from tests.gguf_files import byte_tokenizer, tiny_llama, write_gguf

KINDS = [kind for kind in gguf.GGMLQuantizationType if can_dequantise(kind)]
NONE = [kind for kind in gguf.GGMLQuantizationType if not can_dequantise(kind)]
WIDTH = 256  # values of the largest blocks


def blocks(kind, rows, width, rng):
    """Bytes of rows: quantised where the package can, drawn where it cannot."""
    values = rng.standard_normal((rows, width)).astype(np.float32)
    if kind.name == "F64":
        return values.astype(np.float64)
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        drawn = rng.integers(0, 256, (rows, width // block, size), dtype=np.uint8)
        return drawn.reshape(rows, -1)


def test_the_kinds_are_those_of_the_package():
    assert {kind.name for kind in NONE} <= {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "Q1_0"}
    assert len(KINDS) >= 25


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_are_what_the_package_makes_of_them(kind, tmp_path):
    rng = np.random.default_rng(0)
    data = blocks(kind, 24, 2 * WIDTH, rng)
    file = write_gguf(tmp_path / "x.gguf", "x", {}, {"w.weight": data.view(np.uint8)}, {"w.weight": kind})
    with np.errstate(all="ignore"):  # drawn scales may be no numbers
        expected = data.astype(np.float32) if kind.name == "F64" else gguf.dequantize(data, kind)
        stored = read_header(file).tensors["w.weight"]
        assert stored.shape == expected.shape == (24, 2 * WIDTH)
        tensor = DequantisedTensor(file, "w.weight", stored.shape, stored)
        np.testing.assert_array_equal(tensor.read_rows(0, 24), expected)
        np.testing.assert_array_equal(tensor.read_rows(5, 9), expected[5:9])
        order = rng.permutation(24)
        mixed = DequantisedTensor(file, "w.weight", stored.shape, stored, order=order, shift=0.5)
        np.testing.assert_array_equal(mixed.read_rows(3, 6), expected[order[3:6]] + np.float32(0.5))


def test_three_axes_are_rows_of_rows(tmp_path):
    values = np.arange(3 * 4 * 8, dtype=np.float32).reshape(3, 4, 8)
    file = write_gguf(tmp_path / "x.gguf", "x", {}, {"w.weight": values})
    stored = read_header(file).tensors["w.weight"]
    np.testing.assert_array_equal(DequantisedTensor(file, "w", (3, 4, 8), stored).read_rows(1, 3), values[1:])
    np.testing.assert_array_equal(
        DequantisedTensor(file, "w", (12, 8), stored).read_rows(2, 7), values.reshape(12, 8)[2:7]
    )
    np.testing.assert_array_equal(DequantisedTensor(file, "w", (4, 8), stored, first=4).read_rows(1, 4), values[1, 1:])


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16", "Q6_K"])
def test_a_model_of_blocks_is_that_of_their_values(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    plain = tiny_llama(tmp_path / "plain.gguf", width=WIDTH)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(plain).tensors}
    kinds = {name: kind for name, values in tensors.items() if values.ndim == 2}
    values = {
        name: np.array(blocks(kind, *v.shape, np.random.default_rng(1))) for name, v in tensors.items() if v.ndim == 2
    }
    norms = {name: np.array(v) for name, v in tensors.items() if v.ndim == 1}
    metadata = {k.removeprefix("llama."): v for k, v in read_header(plain).values.items() if k.startswith("llama.")}
    as_bytes = {name: data.view(np.uint8) for name, data in values.items()}
    with np.errstate(all="ignore"):
        whole = {name: np.nan_to_num(gguf.dequantize(data, kind)) for name, data in values.items()}
        small = write_gguf(tmp_path / "small.gguf", "llama", metadata, as_bytes | norms, kinds)
        large = write_gguf(tmp_path / "large.gguf", "llama", metadata, whole | norms)
        for options in ({}, {"dtype": jnp.bfloat16}, {"mesh": make_mesh(tensor=2, devices=jax.devices()[:2])}):
            mine, theirs = sj.load(small, **options), sj.load(large, **options)
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_array_equal(np.nan_to_num(np.asarray(a, np.float32)), np.asarray(b, np.float32))


@pytest.mark.parametrize("kind", NONE, ids=lambda kind: kind.name)
def test_a_kind_that_cannot_be_read_is_one_line(kind, tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((WIDTH, WIDTH // block * size), np.uint8)
    plain = tiny_llama(tmp_path / "plain.gguf", width=WIDTH)
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(plain).tensors}
    metadata = {k.removeprefix("llama."): v for k, v in read_header(plain).values.items() if k.startswith("llama.")}
    name = "blk.0.attn_q.weight"
    file = write_gguf(tmp_path / "x.gguf", "llama", metadata, tensors | {name: data}, {name: kind})
    with pytest.raises(ValueError, match=f"{file}: tensor '{name}' has dtype {kind.name}"):
        sj.load(file)


WRONG = {
    "architecture": ({}, {"arch": "mamba2"}, "architecture 'mamba2'; of GGUF files streamjax reads llama, "),
    "nearest": ({}, {"arch": "qwen4"}, "(the nearest is qwen"),
    "experts": ({"expert_count": 4, "expert_used_count": 2}, {}, "tensor 'model.layers.0.block_sparse_moe."),
    "many experts": ({"expert_count": 2**31}, {}, "'num_local_experts' is 2147483648, and there are"),
    "layers": ({"block_count": 2**31}, {}, "'num_hidden_layers' is 2147483648, and there are"),
    "heads": ({"attention.head_count": 2**30}, {}, "'num_attention_heads' is 1073741824"),
    "no heads": ({"attention.head_count": 0}, {}, "its metadata, as a config.json:"),
    "more layers": ({"block_count": 2}, {}, "tensor 'model.layers.1."),
    "width": ({"embedding_length": 64}, {}, "has shape [259, 32]; its metadata asks for [259, 64]"),
    "kind of value": ({"block_count": "one"}, {}, "'llama.block_count' is 'one'; expected int"),
    "layer by layer": ({"attention.head_count_kv": [1, 2]}, {}, "differs from layer to layer"),
    "values": ({"attention.value_length": 8}, {}, "keys are 16 wide and values 8"),
    "scaling": ({"rope.scaling.type": "new"}, {}, "'llama.rope.scaling.type' is 'new', not known"),
}


@pytest.mark.parametrize("case", WRONG)
def test_metadata_that_cannot_be_are_one_line(case, tmp_path):
    changes, other, message = WRONG[case]
    plain = tiny_llama(tmp_path / "plain.gguf", tokenizer=byte_tokenizer())
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(plain).tensors}
    metadata = {k.removeprefix("llama."): v for k, v in read_header(plain).values.items() if k.startswith("llama.")}
    file = write_gguf(tmp_path / "x.gguf", other.get("arch", "llama"), metadata | changes, tensors)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is looked at
        sj.load(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_tensor_too_many_is_one_line_and_a_key_too_many_a_warning(tmp_path):
    plain = tiny_llama(tmp_path / "plain.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(plain).tensors}
    metadata = {k.removeprefix("llama."): v for k, v in read_header(plain).values.items() if k.startswith("llama.")}
    more = tensors | {"blk.0.attn_sinks.weight": np.zeros(2, np.float32)}
    file = write_gguf(tmp_path / "x.gguf", "llama", metadata, more)
    with pytest.raises(
        ValueError, match=f"{file}: unexpected tensor 'blk.0.attn_sinks.weight'; its metadata describes"
    ):
        sj.load(file)
    file = write_gguf(tmp_path / "y.gguf", "llama", metadata | {"new.key": 3, "new.none": 0}, tensors)
    with pytest.warns(UserWarning, match="metadata that streamjax does not know: new.key$"):
        sj.load(file)


def test_a_file_that_is_cut_while_it_is_read_is_one_line(tmp_path):
    file = tiny_llama(tmp_path / "x.gguf")
    stored = read_header(file).tensors["token_embd.weight"]
    tensor = DequantisedTensor(file, stored.name, stored.shape, stored)
    file.write_bytes(file.read_bytes()[: stored.offset + 100])
    with pytest.raises(ValueError, match="has become shorter while tensor 'token_embd"):
        tensor.read_rows(0, 8)
