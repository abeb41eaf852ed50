"""Pages whose slots lie over the `context` axis: the logits of one device, and no cache gathered at a decode step."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import streamjax as sj
from streamjax.kv.slots.over_devices import read_ring_over_devices, write_ring_over_devices
from streamjax.kv.slots.ring_buffer import read_ring, write_ring
from streamjax.parallel.mesh import make_mesh, shard_model
from tests.covering import rest_slow
from tests.parallel.small_models import CONFIG, one_layer
from tests.parallel.test_collectives import COLLECTIVE

ROWS = 3
SMALL = {"sinks": 2, "window": 3, "capacity": 24, "page": 4, "top_k": 3}  # 7 pages in 28 slots: devices share pages
CACHES = {
    "quest": sj.kv.preset("quest", **SMALL),
    "whole_pages": sj.kv.preset("quest", **SMALL | {"capacity": 28}),  # 8 pages: two a device, and so their bounds
    "inf_llm": sj.kv.preset("inf_llm", **SMALL, representatives=2, block=4),
    "mpcache": sj.kv.preset("mpcache", **SMALL, keep=0.5, every=4, clusters=3),
    "hip": sj.kv.preset("hip", **SMALL, block=4),
    "topk_attention": sj.kv.preset("topk_attention", **SMALL | {"page": 2, "capacity": 22}),
    "lserve": sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(3), sj.kv.Pages(4, 24, 3, sj.kv.MinMax(2), read_newest=True)),
    "then_full": sj.kv.Cascade(sj.kv.Window(3), sj.kv.Pages(4, 24, 3), sj.kv.Full(48)),  # what pages lose is read
}
WIDTHS = [8, 8, 1, 1, 8, 1, 1, 1, 1, 8, 1, 1, 8, 1, 1, 1, 1, 1]


def alibi():
    """The model with a slope for each head in the place of rotations."""
    model = one_layer()
    block = model.config.blocks[0]
    mixer = dataclasses.replace(block.mixer, rope=None, alibi_slopes=tuple(0.1 * i for i in range(CONFIG.num_heads)))
    config = model.config.replace(blocks=(dataclasses.replace(block, mixer=mixer),))
    return jax.jit(lambda key: sj.Decoder(config, key))(jax.random.key(0))


def stream(model, cache):
    """Logits of the real tokens of every chunk."""
    random, state, found = np.random.default_rng(0), sj.init_state(model, CACHES[cache], ROWS), []
    for width in WIDTHS:
        tokens = random.integers(0, CONFIG.vocab_size, (ROWS, width)).astype(np.int32)
        count = np.array([width, random.integers(0, width + 1), width - width // 3], np.int32)
        state, logits = sj.step(model, state, tokens, count)
        found.append(np.asarray(logits)[np.arange(width) < count[:, None]])
    return np.concatenate(found)


@functools.cache
def alone(cache, make):
    return stream(make(), cache)


@pytest.mark.parametrize("context", [4, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("cache", "make"),
    [("quest", one_layer), pytest.param("quest", alibi, marks=pytest.mark.slow),
     *(pytest.param(name, one_layer, marks=pytest.mark.slow) for name in CACHES if name != "quest")],
)  # fmt: skip
def test_the_logits_are_those_of_one_device(cache, make, context):
    mesh = make_mesh(context=context, tensor=2, devices=jax.devices()[: 2 * context])
    with jax.set_mesh(mesh):
        model = shard_model(make(), mesh)
        ring = sj.init_state(model, CACHES[cache], ROWS).layers[0]
        slots = max(leaf.shape[2] for leaf in jax.tree.leaves(ring) if leaf.ndim == 4)
        assert any(x.sharding.shard_shape(x.shape)[2] == slots // context for x in jax.tree.leaves(ring) if x.ndim == 4)
        found = stream(model, cache)
    np.testing.assert_allclose(found, alone(cache, make), atol=2e-5)


@pytest.mark.parametrize("cache", rest_slow(CACHES, "quest"))
def test_a_decode_step_gathers_no_pages(cache):
    """What crosses is at most a number for each page and key head, or as large as queries."""
    mesh = make_mesh(context=4, tensor=2)
    tiers = [
        dataclasses.replace(tier, capacity=508) if isinstance(tier, sj.kv.Pages) else tier
        for tier in CACHES[cache].tiers
    ]
    pages, pool = sj.kv.Cascade(*tiers), next(tier.pages for tier in tiers if isinstance(tier, sj.kv.Pages))
    with jax.set_mesh(mesh):
        model = shard_model(one_layer(), mesh)
        state = sj.init_state(model, pages, ROWS)
        tokens, count = jnp.zeros((ROWS, 1), jnp.int32), jnp.ones((ROWS,), jnp.int32)
        text = sj.step.trace(model, state, tokens, count).lower().compile().as_text()
    largest = max(
        math.prod(int(size) for size in shape.split(",") if size)
        for result, _ in COLLECTIVE.findall(text)
        for shape in re.findall(r"\w+\[([\d,]*)\]", result)
    )
    assert largest <= ROWS * CONFIG.num_kv_heads * pool


@pytest.mark.parametrize("rows", [1, 2])
def test_rings_over_devices_are_rings(rows):
    """Runs that begin and end on any of eight devices, wrap, and are longer than the ring."""
    random = np.random.default_rng(0)
    buffer = jnp.asarray(random.standard_normal((rows, 1, 24, 2)), jnp.float32)
    mesh = make_mesh(context=8)
    placed = jax.device_put(buffer, NamedSharding(mesh, PartitionSpec(None, None, "context")))
    write, read = jax.jit(functools.partial(write_ring, axis=2)), jax.jit(read_ring, static_argnums=(2, 3))
    over, read_over = jax.jit(write_ring_over_devices), jax.jit(read_ring_over_devices, static_argnums=2)
    for width in (1, 7, 30):
        for _ in range(8):
            chunk = jnp.asarray(random.standard_normal((rows, 1, width, 2)), jnp.float32)
            cursor = jnp.asarray(random.integers(0, 24, rows), jnp.int32)
            start = jnp.asarray(random.integers(0, width, rows), jnp.int32)
            count = jnp.asarray(random.integers(0, width - np.asarray(start) + 1), jnp.int32)
            with jax.set_mesh(mesh):
                found, seen = over(placed, chunk, cursor, start, count), read_over(placed, cursor, width)
            np.testing.assert_array_equal(found, write(buffer, chunk, cursor, start, count))
            np.testing.assert_array_equal(seen, read(buffer, cursor, width, 2))
