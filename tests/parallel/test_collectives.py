"""What crosses devices, read off the compiled programs: activations and gathered weights, never a KV cache."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import streamjax as sj
from streamjax.kv import tier
from streamjax.parallel.mesh import make_mesh, shard_model
from tests.parallel.small_models import BATCH, CONFIG, MESHES, small_model

SLOTS = 62
CACHES = {
    "streaming_llm": sj.kv.preset("streaming_llm", sinks=4, window=SLOTS - 4),
    "window": sj.kv.Cascade(sj.kv.Window(SLOTS)),
    "dense": sj.kv.preset("dense", capacity=SLOTS),
}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def _collectives(mesh: str, cache: str, width: int) -> list[tuple[str, tuple[int, ...]]]:
    """Operation and shape of every collective in a compiled step; those on less than 64 numbers left out."""
    mesh = make_mesh(**MESHES[mesh])
    with jax.set_mesh(mesh):
        model = shard_model(small_model(), mesh)
        state = sj.init_state(model, CACHES[cache], BATCH)
        tokens, count = jnp.zeros((BATCH, width), jnp.int32), jnp.ones((BATCH,), jnp.int32)
        text = sj.step.trace(model, state, tokens, count).lower().compile().as_text()
    found = []
    for result, operation in COLLECTIVE.findall(text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", result):
            shape = tuple(int(size) for size in shape.split(",") if size)
            if math.prod(shape) >= 64:
                found.append((operation, shape))
    return found


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
        monkeypatch.setattr(tier, name, 16)
    jax.clear_caches()
    partial = BATCH, width, CONFIG.num_heads // 4, CONFIG.head_dim + 1
    found = [shape for _, shape in _collectives("context2-tensor4", "dense", width)]
    assert found.count(partial) == CONFIG.num_layers
    assert max(map(math.prod, found)) <= BATCH * width * CONFIG.d_model


@pytest.mark.parametrize("cache", CACHES)
def test_decode_with_slots_over_devices_keeps_them_there(cache):
    """Each device attends to its own slots; what is exchanged is as large as queries, not as the cache."""
    for _, shape in _collectives("context2-tensor4", cache, 1):
        assert math.prod(shape) <= BATCH * CONFIG.d_model
