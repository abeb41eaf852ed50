"""Training with sequences over the `context` axis: the loss and gradient of one device, for every kind of attention.

The two orders that cut sequences are tried with chunks that a stretch has several of, so that what a chunk hands to the
next one crosses devices at some places and not at others.
"""

import dataclasses
import functools

import jax
import pytest

from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseConfig,
    GatedDeltaConfig,
    LatentAttentionConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
    SSDConfig,
)
from streamjax.models.config.attention import TemperatureConfig
from streamjax.models.lora.adapters import TARGETS, LoRAParam
from streamjax.models.lora.attaching import add_lora
from streamjax.parallel.mesh import make_mesh, shard_model
from streamjax.training import shard_batch
from tests.training.gradient_checks import assert_same, gradient, random_batch, random_model

ROWS, LENGTH = 2, 48
DYNAMIC = RopeConfig(kind="dynamic", factor=3.0, original_max_position=16)
HEADS = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4)
MIXERS = {
    "full": dataclasses.replace(HEADS, qk_norm=NormConfig(), softcap=2.0, output_gate=True),
    "window": dataclasses.replace(HEADS, window=9, sink_logits=True),
    "sinks": dataclasses.replace(HEADS, window=7, sinks=3),
    "chunk": dataclasses.replace(
        HEADS, chunk=10, rope=RopeConfig(kind="dynamic", factor=3.0, original_max_position=16)
    ),
    "alibi": dataclasses.replace(HEADS, rope=None, alibi_slopes=(0.5, 0.25, 0.125, 0.0)),
    "nope": dataclasses.replace(HEADS, rope=None, temperature=TemperatureConfig(0.3, 4), value_is_key=True),
    "latent": LatentAttentionConfig(4, 6, 4, 2, 3, rope=RopeConfig(rotary_dim=2)),
    "delta": GatedDeltaConfig(4, 2, key_dim=5, value_dim=6),
    "ssd": SSDConfig(4, 2, head_dim=6, state_dim=5),
}


def config_of(*names, repeats=1):
    blocks = tuple(BlockConfig(mixer=MIXERS[name], mlp=DenseConfig(24)) for name in names)
    return ModelConfig(vocab_size=32, d_model=16, blocks=blocks * repeats)


@functools.cache
def expected(names, packed, repeats=1, method="full"):
    """A model, whose layers are stacked if they repeat, a batch, and the loss and gradient on one device."""
    with jax.enable_x64(True):
        config = config_of(*names, repeats=repeats)
        model = random_model(config, stacked=repeats > 1)
        batch = random_batch(config.vocab_size, ROWS, LENGTH, packed=packed)
        return model, batch, gradient(model, batch, method)


ALL, LOCAL, RECURRENT = tuple(MIXERS)[:7], ("sinks", "chunk", "nope"), ("delta", "ssd")


@pytest.mark.usual("axes0-names0-True-full-options0", "axes1-names1-False-remat-options1")
@pytest.mark.parametrize(
    ("axes", "names", "packed", "method", "options"),
    [
        ({"data": 2, "context": 2, "tensor": 2}, LOCAL, True, "full", {"context_exchange": "ring"}),
        ({"fsdp": 2, "context": 4}, ("full", "latent"), False, "remat", {"logits_chunk": 5}),
        ({"data": 2, "context": 2, "tensor": 2}, RECURRENT, True, "full", {}),
        pytest.param({"context": 8}, RECURRENT, False, "remat", {}, marks=pytest.mark.slow),
        pytest.param({"context": 8}, ALL, True, "full", {"context_exchange": "gather"}, marks=pytest.mark.slow),
        pytest.param({"context": 8}, ALL, False, "remat", {"context_exchange": "ring"}, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_that_of_one_device(axes, names, packed, method, options):
    model, batch, right = expected(names, packed)
    mesh = make_mesh(**axes)
    with jax.enable_x64(True), jax.set_mesh(mesh):
        found = gradient(shard_model(model, mesh), shard_batch(batch, mesh), method, **options)
    assert_same(found, right)


KINDS = tuple(name for name in ALL if name != "latent")
ORDERS = [
    # mesh, layers, how often they repeat, packed rows, method, options
    ({"data": 2, "context": 2, "tensor": 2}, ("sinks", "delta"), 2, True, "layer", {"chunk_size": 8}),
    ({"data": 2, "context": 2, "tensor": 2}, ("sinks", "delta"), 2, True, "chunk", {"chunk_size": 8}),
    ({"context": 8}, KINDS, 1, True, "layer", {"chunk_size": 3, "context_exchange": "gather"}),
    ({"context": 8}, KINDS, 1, False, "layer", {"chunk_size": 2, "context_exchange": "ring", "segment": 2}),
    ({"fsdp": 2, "context": 4}, RECURRENT, 1, True, "layer", {"offload": "host", "offload_fraction": 0.5}),
    ({"context": 2, "fsdp": 2, "tensor": 2}, ("nope", "chunk", "ssd"), 2, False, "chunk", {"chunk_size": 24}),
    ({"context": 4, "tensor": 2}, ("latent",), 4, True, "layer", {"chunk_size": 4}),
    ({"context": 4, "tensor": 2}, ("latent",), 4, True, "chunk", {"chunk_size": 4}),
    ({"fsdp": 2, "context": 4}, ("sinks", "full", "delta"), 4, True, "chunk", {"chunk_size": 4}),
    ({"context": 8}, ("alibi",), 8, True, "chunk", {"chunk_size": 2}),
    # What attention found is kept, of that which goes over all devices.
    (
        {"data": 2, "context": 2, "tensor": 2},
        ("full", "window"),
        1,
        True,
        "layer",
        {"chunk_size": 8, "keep_attention": True, "context_exchange": "ring"},
    ),
    (
        {"fsdp": 2, "context": 4},
        ("full", "nope", "delta"),
        2,
        False,
        "layer",
        {"chunk_size": 4, "keep_attention": True, "offload": "host", "offload_fraction": 0.5},
    ),
    ({"context": 8}, ("alibi", "sinks"), 1, True, "layer", {"chunk_size": 3, "keep_attention": True}),
    # Layers that differ, one or more a device, and stacked ones that devices do not divide: branches of a program.
    ({"context": 8}, (*KINDS, *RECURRENT), 1, True, "chunk", {"chunk_size": 2}),
    ({"fsdp": 2, "context": 2, "tensor": 2}, ("sinks", "full", "delta"), 1, True, "chunk", {"chunk_size": 12}),
    ({"context": 4, "data": 2}, ("window", "ssd"), 3, True, "chunk", {"chunk_size": 6}),
]


@pytest.mark.usual("axes0-names0-2-True-layer-options0", "axes1-names1-2-True-chunk-options1")
@pytest.mark.parametrize(("axes", "names", "repeats", "packed", "method", "options"), ORDERS)
def test_orders_that_cut_sequences(axes, names, repeats, packed, method, options):
    """Each is a program of eight devices, which costs what it costs to compile."""
    # Latent attention's two forms are 1e-9 apart, on one device too, and 1e-16 where nothing rotates. So it is compared
    # with the order itself.
    model, batch, right = expected(names, packed, repeats, method if "latent" in names else "full")
    mesh = make_mesh(**axes)
    with jax.enable_x64(True), jax.set_mesh(mesh):
        found = gradient(shard_model(model, mesh), shard_batch(batch, mesh), method, **options)
    assert_same(found, right)


@pytest.mark.slow
def test_adapters_of_layers_that_differ():
    """Over a pipeline in branches, where what is not trained has no gradient."""
    blocks = tuple(BlockConfig(MIXERS["full"], DenseConfig(width)) for width in (24, 20))
    mesh = make_mesh(data=2, fsdp=2, context=2)
    with jax.enable_x64(True):
        model = add_lora(random_model(ModelConfig(32, 16, blocks)), 2, 4.0, TARGETS, jax.random.key(1))
        model = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), model)
        batch = random_batch(32, 4, LENGTH, packed=True)
        right = gradient(model, batch, "full", trainable=LoRAParam)
        with jax.set_mesh(mesh):
            arrays = shard_model(model, mesh), shard_batch(batch, mesh)
            found = gradient(*arrays, "chunk", chunk_size=8, trainable=LoRAParam)
    assert_same(found, right)
