"""What `method="auto"` takes for which memory, and that it then does what the chosen method does."""

import dataclasses

import jax
import numpy as np
import pytest

import streamjax as sj
from benchmarks.model_shapes import SHAPES
from streamjax.training import BackpropConfig, choose, estimate, train
from streamjax.training.backprop.planning.method_choice import (
    HEADROOM,
    UNSTACKED_HEADROOM,
    available_host_bytes,
    device_memory_bytes,
)

QWEN = SHAPES["qwen3-8b"]
ROW = {"batch_size": 1, "length": 65536}


def budget(config=QWEN, headroom=HEADROOM, **arguments):
    """Memory that just holds the estimate of some arguments."""
    return int(estimate(config, **ROW, **arguments).device_bytes / headroom) + 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "full"},
        {"method": "remat", "keep_attention": True},
        {"method": "remat"},
        {"method": "layer", "chunk_size": 2048},
        {"method": "layer", "chunk_size": 2048, "segment": 2},
        {"method": "layer", "chunk_size": 2048, "segment": 6},
        {"method": "layer", "chunk_size": 2048, "offload": "host", "offload_fraction": 0.5},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_the_fastest_that_fits_is_taken(arguments):
    memory_bytes = budget(**arguments)
    found = choose(QWEN, **ROW, memory_bytes=memory_bytes)
    assert found.arguments == arguments
    assert found.memory == estimate(QWEN, **ROW, **arguments)
    assert choose(QWEN, **ROW, memory_bytes=memory_bytes - 2**20).arguments != arguments


def test_a_windowed_model_takes_the_chunk_order():
    """Few heads of keys and values, all behind windows: they take less than the layers' inputs."""
    config = QWEN.replace(num_kv_heads=2, windows=(1024,) * 36)
    known = {"batch_size": 1, "length": 2**18, "grad_dtype": "bfloat16", "kv_grad_dtype": "bfloat16"}
    cut = {"chunk_size": 2048}
    chunk, layer = (estimate(config, method=name, **cut, **known).device_bytes for name in ("chunk", "layer"))
    assert chunk < layer
    assert choose(config, memory_bytes=int(chunk / HEADROOM) + 1, **known).arguments == {"method": "chunk", **cut}


def test_segments_are_whole_periods():
    config, length = SHAPES["gemma-3-4b"], 2**19
    segments = {
        choose(config, batch_size=1, length=length, memory_bytes=size * 10**9).arguments.get("segment", 0)
        for size in (60, 90, 120, 150)
    }
    assert segments - {0}
    assert all(segment % 6 == 0 for segment in segments)


def test_a_chunk_is_no_longer_than_the_sequence():
    found = choose(QWEN, batch_size=1, length=512, memory_bytes=budget(method="layer"), platform="tpu")
    assert found.arguments.get("chunk_size", 512) == 512


def test_nothing_that_fits_is_an_error_with_what_comes_closest():
    message = r"no backprop method fits 1 x 65536 tokens; closest: layer, chunk_size 2048, .* of 8 GB.* shorten the seq"
    with pytest.raises(ValueError, match=message):
        choose(QWEN, **ROW, memory_bytes=8 * 10**9)


def test_a_cpu_neither_moves_inputs_nor_recomputes_layers_that_are_not_stacked():
    full = budget(method="full", platform="cpu", headroom=UNSTACKED_HEADROOM)
    kwargs = {"platform": "cpu", "stacked": False}
    assert choose(QWEN, **ROW, memory_bytes=full, **kwargs).arguments == {"method": "full"}
    assert choose(QWEN, **ROW, memory_bytes=full - 2**20, **kwargs).arguments["method"] == "layer"
    with pytest.raises(ValueError, match="scan_layers=True"):
        choose(QWEN, **ROW, memory_bytes=40 * 10**9, **kwargs)


def test_a_choice_is_told_in_one_line():
    found = choose(QWEN, **ROW, memory_bytes=budget(method="layer", segment=6))
    assert found.describe(95 * 10**9).startswith("layer, chunk_size 2048, segment 6, ")
    assert found.describe(95 * 10**9).endswith(f"estimated {found.memory.device_bytes / 1e9:.3g} of 95 GB")
    found = choose(QWEN, **ROW, memory_bytes=budget(method="layer", offload="host"))
    assert f"{found.memory.host_bytes / 1e9:.3g} GB in the host's memory" in found.describe(95 * 10**9)


@pytest.mark.slow
def test_auto_gives_the_gradient_of_what_it_chooses(model, batch):
    rows, length = batch["tokens"].shape
    loss, grads = sj.training.loss_and_grad(model, batch, "full")
    kwargs = {"dtype": model.dtype, "param_dtype": model.dtype, "platform": "cpu", "stacked": False}
    size = estimate(model.config, batch_size=rows, length=length, method="layer", chunk_size=8, **kwargs).device_bytes
    assert estimate(model.config, batch_size=rows, length=length, method="full", **kwargs).device_bytes > size
    for memory_bytes in (None, int(size / UNSTACKED_HEADROOM) + 1):  # the machine's: full; this much: a cut sequence
        found_loss, found = sj.training.loss_and_grad(model, batch, "auto", chunk_size=8, memory_bytes=memory_bytes)
        assert float(found_loss) == pytest.approx(float(loss), rel=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_auto_refuses_what_does_not_fit_and_what_it_chooses_itself(model, batch):
    with pytest.raises(ValueError, match="no backprop method fits"):
        sj.training.loss_and_grad(model, batch, "auto", memory_bytes=1000)
    with pytest.raises(
        ValueError, match=r'method "auto" chooses segment, offload, keep_attention, which are 2, None, False'
    ):
        sj.training.loss_and_grad(model, batch, "auto", segment=2)
    with pytest.raises(ValueError, match="memory_bytes is for method \"auto\", and not for 'layer'"):
        sj.training.loss_and_grad(model, batch, "layer", memory_bytes=10**9)
    with pytest.raises(ValueError, match='method "auto" chooses'):
        BackpropConfig(method="auto", offload="host")


def test_a_run_chooses_once_and_says_what(run_config, tmp_path, caplog):
    config = dataclasses.replace(run_config, steps=1, backprop=BackpropConfig(method="auto", chunk_size=8))
    with caplog.at_level("INFO"):
        state = train(config, tmp_path, progress=False)
    assert int(state.step) == 1
    assert len([line for line in caplog.messages if line.startswith("backprop: full, estimated ")]) == 1


def test_the_memory_of_this_machine(tmp_path):
    assert 2**20 < device_memory_bytes() < 2**50
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  64 kB\nMemAvailable:  10 kB\n")
    assert available_host_bytes(told) == 10240
    assert available_host_bytes(tmp_path / "none") > 2**20
