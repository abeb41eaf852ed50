"""Chunked backprop on a mesh: the gradient of one device, split as parameters are, reduced once and not in a loop."""

import re
from functools import partial

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.parallel.mesh import make_mesh, shard_model
from streamjax.training import shard_batch
from tests.parallel.small_models import BATCH, CONFIG, one_layer, small_model

LENGTH, CHUNK = 20, 4
MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data2-tensor4": {"data": 2, "tensor": 4},
}
ORDERS = {
    "layer": {"method": "layer"},
    "segments": {"method": "layer", "segment": 2},
    "chunk": {"method": "chunk"},
}


@pytest.fixture(scope="module")
def batch():
    """Uneven weights: the mean over all rows is not the mean of the devices' means."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)
    weights = rng.uniform(0.0, 2.0, (BATCH, LENGTH)).astype(np.float32)
    weights[3] = 0.0
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def compiled(mesh, model, batch, order):
    step = partial(sj.training.loss_and_grad, chunk_size=CHUNK, **ORDERS[order])
    with jax.set_mesh(mesh):
        args = shard_model(model, mesh), shard_batch(batch, mesh)
        return jax.jit(step).lower(*args).compile(), args


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("mesh", "order"), [("data8", "chunk"), ("fsdp8", "layer"), *[("data2-fsdp2-tensor2", name) for name in ORDERS]]
)
def test_the_gradient_is_that_of_one_device(batch, mesh, order, stacked):
    compare(small_model(stacked), batch, mesh, order)


@pytest.mark.slow
def test_norms_over_all_heads(batch):
    """The heads of a norm lie on several devices, and so does what it is over."""
    norms = {"qk_norm_over": "projection", "pre_norms": False, "post_norms": True}
    config = CONFIG.replace(**norms, residual_scale=0.5, logit_scale=0.5)
    compare(sj.Decoder(config, jax.random.key(0)), batch, "data2-fsdp2-tensor2", "chunk")


def compare(model, batch, mesh, order):
    """The program that finds the gradient of one device on a mesh, each array split as its parameter."""
    expected_loss, expected = sj.training.loss_and_grad(model, batch)
    step, args = compiled(make_mesh(**MESHES[mesh]), model, batch, order)
    loss, grads = step(*args)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for found, right, param in zip(*map(jax.tree.leaves, (grads, expected, args[0])), strict=True):
        scale = float(np.max(np.abs(right)))
        np.testing.assert_allclose(np.asarray(found) / scale, np.asarray(right) / scale, atol=1e-5)
        assert found.sharding.is_equivalent_to(param.sharding, param.ndim)
    return step


def collectives_in_loops(text: str) -> set[str]:
    """Sums over devices that stand in the body of a loop, or in what such a body calls."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, flags=re.M | re.S))
    calls = {
        name: set(re.findall(r"(?:body|calls|to_apply|condition)=%?([\w.\-]+)", body)) for name, body in bodies.items()
    }
    inside = set().union(*(re.findall(r" while\(.*?body=%?([\w.\-]+)", body) for body in bodies.values()))
    while more := set().union(*(calls.get(name, set()) for name in inside)) - inside:
        inside |= more
    found = set()
    for name in inside:
        found |= set(re.findall(r" (all-reduce|reduce-scatter)(?:-start)?\(", bodies.get(name, "")))
    return found


@pytest.mark.usual("fsdp8-layer")
@pytest.mark.parametrize(
    ("mesh", "order"),
    [
        pytest.param(mesh, order, marks=() if (mesh == "fsdp8") == (order == "layer") else pytest.mark.slow)
        for mesh in ("data8", "fsdp8")
        for order in ORDERS
    ],
)
def test_gradients_are_reduced_once_a_step(batch, mesh, order):
    """And the gradient is that of one device. Every loop that a single layer has walks chunks, blocks or pieces of
    logits, and none sums over devices.
    """
    text = compare(one_layer(), batch, mesh, order).as_text()
    assert re.search(r" (all-reduce|reduce-scatter)(-start)?\(", text)
    assert re.search(r" while\(", text)
    assert not collectives_in_loops(text)


def test_the_search_finds_a_sum_in_a_loop():
    """The same search, where there is one: a sum over devices at every turn."""
    mesh = make_mesh(data=8)

    def turn(x):
        return jax.lax.fori_loop(0, 300, lambda i, y: y * 0.5 + jax.lax.psum(y, "data"), x)

    spec = jax.sharding.PartitionSpec("data")
    total = jax.jit(jax.shard_map(turn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    assert collectives_in_loops(total.lower(np.ones(8, np.float32)).compile().as_text()) == {"all-reduce"}
