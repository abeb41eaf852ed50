"""Hierarchical sparse attention over the `context` axis: pages, numbers and gradients of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api
from streamjax.attention.context import page_pairs
from streamjax.attention.context.landmarks import cut_pages, read_over_devices
from streamjax.attention.landmarks import page_forms
from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.attention.landmarks.page_choice import VisiblePages
from streamjax.models import HSAConfig, ModelConfig
from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    ExpertsConfig,
    RopeConfig,
    SSDConfig,
)
from streamjax.parallel.mesh import make_mesh, shard_model
from streamjax.training import loss_and_grad, shard_batch
from tests.oracles.hierarchical import hierarchical_attention
from tests.training.gradient_checks import assert_same, gradient, random_batch, random_model

ROWS, LENGTH, HEADS, KEY_HEADS, WIDTH, SIZE, TOP_K = 2, 48, 4, 2, 3, 4, 3
CONTEXT4 = {"context": 4, "tensor": 2}


def drawn(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("size", [4, 5, 7, 20])  # stretches of 12: whole pages, and ends within one; none on a device
def test_a_page_is_cut_where_its_last_token_lies(size):
    x, segments = (
        drawn(ROWS, LENGTH, 2, dtype=jnp.float32),
        jnp.arange(ROWS * LENGTH, dtype=jnp.int32).reshape(ROWS, -1),
    )
    with jax.set_mesh(make_mesh(**CONTEXT4)):
        of_size = jax.jit(functools.partial(cut_pages, size=size))
        (cut, number), (of_tokens, _) = of_size(x), of_size(segments)
    room, pages = -(-12 // size), LENGTH // size
    expected = np.full((4, room), -1)
    for page in range(pages):
        device = ((page + 1) * size - 1) // 12
        expected[device, np.argmax(expected[device] < 0)] = page
    np.testing.assert_array_equal(number, np.tile(expected.reshape(-1), (ROWS, 1)))
    for place in np.flatnonzero(expected.reshape(-1) >= 0):
        at = slice(expected.reshape(-1)[place] * size, (expected.reshape(-1)[place] + 1) * size)
        np.testing.assert_array_equal(cut[:, place], x[:, at])
        np.testing.assert_array_equal(of_tokens[:, place], segments[:, at])


def memory(packed, dtype=jnp.float64, size=SIZE):
    """Queries of a sequence, their pages, and which each of them sees."""
    pages = LENGTH // size
    q, retrieval = (
        drawn(ROWS, LENGTH, HEADS, WIDTH, dtype=dtype),
        drawn(ROWS, LENGTH, KEY_HEADS, WIDTH, seed=1, dtype=dtype),
    )
    k, v = (drawn(ROWS, KEY_HEADS, pages, size, WIDTH, seed=seed, dtype=dtype) for seed in (2, 3))
    landmarks = drawn(ROWS, KEY_HEADS, pages, WIDTH, seed=4, dtype=dtype)
    number = np.tile(np.arange(pages), (ROWS, 1))
    number[:, 5] = -1  # an empty place
    segments = of_pages = None
    if packed:
        segments = np.repeat([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]], LENGTH // 6, axis=1)
        cut = segments.reshape(ROWS, pages, size)
        of_pages = np.where((cut == cut[:, :, :1]).all(2), cut[:, :, 0], -1)
    limit = np.tile(np.arange(LENGTH) // size, (ROWS, 1))
    given = (None if x is None else jnp.asarray(x, jnp.int32) for x in (number, limit, segments, of_pages))
    return q, retrieval, LandmarkPages(k, v, landmarks), VisiblePages(*given)


def numbers(read, q, retrieval, pages, d_out):
    def loss(q, retrieval, pages):
        out = read(q, retrieval, pages)
        return jnp.sum(out * d_out), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, retrieval, pages)
    return out, grads


@pytest.mark.parametrize(
    ("axes", "packed", "form"),
    [
        (CONTEXT4, True, "dense"),
        (CONTEXT4, True, "gathered"),
        ({"data": 2, "context": 2, "tensor": 2}, False, "gathered"),
        pytest.param(
            {"context": 2, "tensor": 4}, False, "dense", marks=pytest.mark.slow
        ),  # fewer key heads than devices
        pytest.param({"context": 2, "tensor": 4}, True, "gathered", marks=pytest.mark.slow),
        pytest.param(CONTEXT4, False, None, marks=pytest.mark.slow),
    ],
)
def test_is_the_attention_of_one_device(monkeypatch, axes, packed, form):
    """And its gradients, in float64; pairs are read a few at a time."""
    monkeypatch.setattr(page_pairs, "GATHERED", 7 * SIZE * WIDTH)
    with jax.enable_x64(True):
        q, retrieval, pages, visible = memory(packed)
        d_out = drawn(*q.shape, seed=6)
        right = numbers(lambda q, r, pages: pages.read(q, r, visible, TOP_K, 0.6, "dense"), q, retrieval, pages, d_out)
        with jax.set_mesh(make_mesh(**axes)):
            found = numbers(
                lambda q, r, pages: read_over_devices(pages, q, r, visible, TOP_K, 0.6, form),
                q,
                retrieval,
                pages,
                d_out,
            )
        for mine, expected in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(mine, expected, atol=1e-12)
        mask = np.asarray(visible.mask())[:, 0]
        for row in range(ROWS):
            arrays = q[row], retrieval[row], pages.k[row], pages.v[row], pages.landmarks[row], mask[row]
            np.testing.assert_allclose(found[0][row], hierarchical_attention(*arrays, TOP_K, 0.6), atol=1e-12)


def test_with_kernels_inside(monkeypatch):
    """Those of GPUs, in their interpreter, forwards and backwards."""
    kernel, shapes = api.hsa_attention, []

    def call(q, k, *args, **known):
        shapes.append((q.shape, k.shape))
        return kernel(q, k, *args, **known, implementation="triton", interpret=True)

    monkeypatch.setattr(page_forms.api, "hsa_attention", call)
    q, retrieval, pages, visible = memory(True, jnp.float32, size=8)
    d_out = drawn(*q.shape, seed=6, dtype=jnp.float32)
    right = numbers(lambda q, r, pages: pages.read(q, r, visible, 2, 0.6, "dense"), q, retrieval, pages, d_out)
    with jax.set_mesh(make_mesh(data=2, context=2, tensor=2)):
        found = numbers(
            lambda q, r, pages: read_over_devices(pages, q, r, visible, 2, 0.6, "pallas"), q, retrieval, pages, d_out
        )
    assert set(shapes) == {((1, LENGTH // 2, 2, WIDTH), (1, 1, 3, 8, WIDTH))}
    for mine, expected in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, window=5)
HSA = HSAConfig(layers=(0, 1), memory_layers=(0,), chunk_size=4, top_k=2)
OF_HEADS = ModelConfig(32, 16, (BlockConfig(ATTENTION, DenseConfig(24)),) * 2, hsa=HSA)
CONFIGS = {
    "shared": OF_HEADS,
    "own": dataclasses.replace(
        OF_HEADS, hsa=HSAConfig(layers=(0, 1), memory_layers=(0, 1), chunk_size=5, top_k=2, encoder_layers=2)
    ),  # stretches end within pages
    "ramba": ModelConfig(
        32,
        16,
        (BlockConfig(SSDConfig(4, 2, head_dim=4, state_dim=4), None),) * 2,
        hsa=dataclasses.replace(
            HSA, attention=AttentionConfig(4, 2, 4, rope=RopeConfig(theta=100.0)), mlp=DenseConfig(24)
        ),
    ),
    # Two memories with heads of their own. Over 4 devices the first goes through one that does not read it.
    "far": ModelConfig(
        32,
        16,
        tuple(
            BlockConfig(dataclasses.replace(ATTENTION, num_kv_heads=heads), DenseConfig(24))
            for heads in (2,) * 6 + (4,) * 2
        ),
        hsa=HSAConfig((0, 5, 6, 7), (0, 6), 4, 2),
    ),
    "experts": ModelConfig(32, 16, (BlockConfig(ATTENTION, ExpertsConfig(4, 2, 8)),), hsa=HSAConfig((0,), (0,), 4, 2)),
}


@functools.cache
def expected(name, packed):
    """A model, a batch, and the loss and gradient on one device."""
    with jax.enable_x64(True):
        config = CONFIGS[name]
        model, batch = random_model(config), random_batch(config.vocab_size, ROWS, LENGTH, packed=packed)
        return model, batch, gradient(model, batch, "full")


@pytest.mark.parametrize(
    ("axes", "name", "packed", "method", "options"),
    [
        ({"data": 2, "context": 2, "tensor": 2}, "shared", True, "full", {}),
        pytest.param({"fsdp": 2, "context": 4}, "own", True, "remat", {}, marks=pytest.mark.slow),
        ({"data": 2, "context": 2, "tensor": 2}, "own", True, "layer", {"chunk_size": 6}),
        ({"data": 2, "context": 2, "tensor": 2}, "shared", True, "chunk", {"chunk_size": 8}),
        pytest.param({"fsdp": 2, "context": 4}, "far", True, "chunk", {"chunk_size": 4}, marks=pytest.mark.slow),
        pytest.param(
            {"fsdp": 2, "context": 2, "tensor": 2}, "ramba", True, "chunk", {"chunk_size": 12}, marks=pytest.mark.slow
        ),
        pytest.param({"context": 8}, "own", False, "full", {}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "context": 2, "tensor": 2}, "ramba", True, "remat", {}, marks=pytest.mark.slow),
        pytest.param({"context": 2, "tensor": 4}, "shared", False, "remat", {}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "context": 2, "expert": 2}, "experts", False, "remat", {}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "context": 4}, "shared", True, "layer", {"chunk_size": 4}, marks=pytest.mark.slow),
        pytest.param({"context": 8}, "own", False, "layer", {"chunk_size": 3, "segment": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"fsdp": 2, "context": 2, "tensor": 2},
            "ramba",
            True,
            "layer",
            {"chunk_size": 6, "offload": "host"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"data": 2, "context": 2, "expert": 2}, "experts", False, "layer", {"chunk_size": 8}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_gradient_is_that_of_one_device(axes, name, packed, method, options):
    model, batch, right = expected(name, packed)
    mesh = make_mesh(**axes)
    with jax.enable_x64(True), jax.set_mesh(mesh):
        found = gradient(shard_model(model, mesh), shard_batch(batch, mesh), method, **options)
    assert_same(found, right)


@pytest.mark.parametrize(
    ("axes", "name", "message"),
    [
        (
            {"context": 2, "tensor": 4},
            "own",
            "a stretch of 24 tokens .* holds no whole pages of 5 tokens: choose a length that 10",
        ),
        (
            {"context": 4, "tensor": 2},
            "shared",
            "deals layers out to devices, and the model has 2: use at most 2 devices",
        ),
    ],
)
def test_what_chunks_cannot_be_is_one_line(axes, name, message):
    model, mesh = jax.eval_shape(lambda: random_model(CONFIGS[name], "float32")), make_mesh(**axes)
    batch = random_batch(CONFIGS[name].vocab_size, ROWS, LENGTH)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(lambda model: loss_and_grad(model, batch, "chunk"), model)
    assert "\n" not in str(error.value)
