"""What crosses devices, read off the compiled programs: activations and gathered weights, never a KV cache."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import streamjax as sj
from streamjax.kv import query as kv_query
from streamjax.kv.slots.over_devices import (
    write_linear_over_devices,
)
from streamjax.kv.slots.ring_buffer import write_linear
from streamjax.models import HSAConfig
from streamjax.parallel.mesh import make_mesh, shard_model
from streamjax.training import shard_batch
from tests.covering import rest_slow
from tests.parallel.small_models import BATCH, CONFIG, MESHES, one_layer, small_model
from tests.training.gradient_checks import compiled, random_batch, random_model

SLOTS = 62
CACHES = {
    "streaming_llm": sj.kv.preset("streaming_llm", sinks=4, window=SLOTS - 4),
    "window": sj.kv.Cascade(sj.kv.Window(SLOTS)),
    "dense": sj.kv.preset("dense", capacity=SLOTS),
}
MORE = {
    "scored": sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(4), sj.kv.Scored(SLOTS - 6, sj.kv.H2O(), every=8)),
    "coded": sj.kv.Cascade(
        sj.kv.Window(6), sj.kv.Full(SLOTS - 6, codec=sj.kv.Int(8, keys="token", values="token", group=6))
    ),
}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def _collectives(
    mesh: str, cache: str, width: int, rows: int = BATCH, make=small_model
) -> list[tuple[str, tuple[int, ...]]]:
    """Operation and shape of every collective in a compiled step; those on less than 64 numbers left out."""
    mesh = make_mesh(**MESHES[mesh])
    with jax.set_mesh(mesh):
        model = shard_model(make(), mesh)
        state = sj.init_state(model, (CACHES | MORE)[cache], rows)
        tokens, count = jnp.zeros((rows, width), jnp.int32), jnp.ones((rows,), jnp.int32)
        text = sj.step.trace(model, state, tokens, count).lower().compile().as_text()
    return [(operation, shape) for operation, shape in _crossing(text) if math.prod(shape) >= 64]


def _crossing(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Operation and shape of every collective in a compiled program."""
    return [
        (operation, tuple(int(size) for size in shape.split(",") if size))
        for result, operation in COLLECTIVE.findall(text)
        for shape in re.findall(r"\w+\[([\d,]*)\]", result)
    ]


@pytest.mark.covering
@pytest.mark.parametrize("width", [1, 8], ids=["decode", "prefill"])
@pytest.mark.parametrize("cache", CACHES)
def test_tensor_parallel_steps_only_sum_activations(cache, width):
    rows = BATCH // 2
    sums = 2 * CONFIG.num_layers + 1  # attention and MLP of each layer, and the embedding
    assert _collectives("data2-tensor4", cache, width) == [("all-reduce", (rows, width, CONFIG.d_model))] * sums


def test_fsdp_gathers_weights_and_nothing_else():
    found = _collectives("data2-fsdp2-tensor2", "streaming_llm", 1)
    gathers = sorted(math.prod(shape) for operation, shape in found if operation == "all-gather")
    d, kv, group, width, mlp, vocab = 40, 2, 2, 6, 28, 40  # kv heads, MLP channels and vocabulary: half of each
    layer = [d * kv * (group + 2) * width, kv * group * width * d, d * 2 * mlp, mlp * d]
    assert gathers == sorted(layer * CONFIG.num_layers + [vocab * d, d * vocab])
    others = {(operation, shape) for operation, shape in found if operation != "all-gather"}
    assert others == {("all-reduce", (2, 1, d))}


@pytest.mark.parametrize("width", [1, 8], ids=["decode", "prefill"])
def test_slots_over_devices_exchange_one_sum_a_layer(width, monkeypatch):
    """Caches larger than what is read at once, too: no block of slots crosses. Maxima are too small to be listed."""
    for name in ("SLOT_BLOCK", "DECODE_SLOT_BLOCK"):
        monkeypatch.setattr(kv_query, name, 16)
    jax.clear_caches()
    partial = BATCH, width, CONFIG.num_heads // 4, CONFIG.head_dim + 1
    found = [shape for _, shape in _collectives("context2-tensor4", "dense", width)]
    assert found.count(partial) == CONFIG.num_layers
    assert max(map(math.prod, found)) <= BATCH * width * CONFIG.d_model


@pytest.mark.parametrize("cache", rest_slow(CACHES | MORE, "streaming_llm"))  # "dense": the test above
def test_decode_with_slots_over_devices_keeps_them_there(cache):
    """Each device attends to its own slots; what is exchanged is as large as queries, not as the cache."""
    for _, shape in _collectives("context2-tensor4", cache, 1, make=one_layer):
        assert math.prod(shape) <= BATCH * CONFIG.d_model


@pytest.mark.parametrize("width", [1, 8], ids=["decode", "prefill"])
def test_a_stream_alone_writes_where_its_slots_lie(width, monkeypatch):
    """Its tokens go into a window of the slots, as on all platforms but CPUs, which no device has to gather."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, **others: default(*arrays))
    jax.clear_caches()
    for _, shape in _collectives("context2-tensor4", "dense", width, rows=1, make=one_layer):
        assert math.prod(shape) <= width * CONFIG.d_model
    jax.clear_caches()


@pytest.mark.parametrize("rows", [1, 2])
def test_writing_over_devices_is_writing(rows):
    """Runs that begin and end on any of eight devices, and beyond the last slot."""
    random = np.random.default_rng(0)
    buffer = jnp.asarray(random.standard_normal((rows, 1, 24, 2)), jnp.float32)
    mesh = make_mesh(context=8)
    placed = jax.device_put(buffer, NamedSharding(mesh, PartitionSpec(None, None, "context")))
    write, over = jax.jit(partial(write_linear, axis=2)), jax.jit(write_linear_over_devices)
    for _ in range(20):
        chunk = jnp.asarray(random.standard_normal((rows, 1, 7, 2)), jnp.float32)
        filled, start = (jnp.asarray(random.integers(0, most, rows), jnp.int32) for most in (25, 4))
        count = jnp.minimum(jnp.asarray(random.integers(0, 4, rows), jnp.int32), 24 - filled)
        with jax.set_mesh(mesh):
            found = over(placed, chunk, filled, start, count)
        np.testing.assert_array_equal(found, write(buffer, chunk, filled, start, count))


@pytest.mark.slow  # its numbers: test_context_training.py
def test_what_attention_found_is_not_computed_again():
    """In layer order keys go round forwards, backwards and, where nothing was kept, once more in front of that."""
    rows, length, mesh = 2, 64, make_mesh(context=4, data=2)
    config = CONFIG.replace(num_layers=2, windows=(None, None))
    with jax.set_mesh(mesh):
        model = shard_model(random_model(config, "float32", stacked=True), mesh)
        batch = shard_batch(random_batch(config.vocab_size, 2 * rows, length), mesh)
        known = {"chunk_size": 8, "context_exchange": "ring"}
        texts = [compiled(model, batch, "layer", keep_attention=kept, **known).as_text() for kept in (True, False)]
    going = ("collective-permute", (2, rows, config.num_kv_heads, length // 4 // 2, config.head_dim))
    kept, again = (_crossing(text).count(going) for text in texts)
    # The loop over turns sends keys and values. In front of it the first turn is that of the way back.
    assert again - kept == 2


@pytest.mark.slow  # its numbers: test_context_landmarks.py
def test_a_pipeline_of_chunks_sends_their_pages_and_no_keys():
    """By a gradient in chunk order; the head is by stretches, so nothing else is as large as a chunk's activations."""
    rows, length, chunk, size = 2, 128, 8, 4
    hsa = HSAConfig(layers=(0, 1), memory_layers=(0,), chunk_size=size, top_k=2)
    config, mesh = CONFIG.replace(num_layers=2, windows=(4, None), hsa=hsa), make_mesh(context=2, data=4)
    with jax.set_mesh(mesh):
        model = shard_model(random_model(config, "float32"), mesh)
        batch = shard_batch(random_batch(config.vocab_size, 4 * rows, length, packed=True), mesh)
        found = _crossing(compiled(model, batch, "chunk", chunk_size=chunk).as_text())
    pages = (rows, config.num_kv_heads, chunk // size, size, config.head_dim)
    of_chunks = {(rows, chunk, config.d_model), pages, pages[:3] + pages[4:]}
    assert {shape for operation, shape in found if operation == "collective-permute"} == of_chunks
    parameters = {leaf.shape for leaf in jax.tree.leaves(model)} | {()}
    assert {shape for operation, shape in found if operation == "all-reduce"} <= parameters | of_chunks
    assert {operation for operation, _ in found} == {"collective-permute", "all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "method"),  # whole pages in a stretch, and not
    [
        (4, "remat"),
        (5, "remat"),
        (4, "layer"),
        (5, "layer"),
    ],
)
def test_of_a_sequence_over_devices_only_landmarks_are_gathered(size, method):
    """By a gradient with hierarchical sparse attention; keys and values of pages go from device to device."""
    rows, length, devices = 2, 64, 4
    hsa = HSAConfig(layers=(0,), memory_layers=(0,), chunk_size=size, top_k=2)
    config, mesh = CONFIG.replace(num_layers=1, windows=(4,), hsa=hsa), make_mesh(context=devices, tensor=2)
    with jax.set_mesh(mesh):
        model = shard_model(random_model(config, "float32"), mesh)
        batch = shard_batch(random_batch(config.vocab_size, rows, length, packed=True), mesh)
        found = _crossing(compiled(model, batch, method).as_text())
    pages, heads, width = -(-length // devices // size), config.num_kv_heads // 2, config.head_dim
    of_landmarks, of_numbers = (rows, heads, devices * pages, width), (rows, devices * pages)
    assert {shape for operation, shape in found if operation == "all-gather"} == {of_landmarks, of_numbers}
    assert ("collective-permute", (rows, heads, pages, size, width)) in found
    assert "all-to-all" not in dict(found)
