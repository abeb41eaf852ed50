"""The Hopper kernel of flash attention in its interpreter, which looks for races, against every logit in float64."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import api
from pallas_kernels.api import platforms
from pallas_kernels.gpu.hopper import attention as hopper_attention
from pallas_kernels.patterns import Full, SinkWindow, SlidingWindow
from tests.kernels.test_flash_kernels import check

interpreted = pytest.mark.skipif(
    not hopper_attention.available(interpret=True), reason="this JAX has no interpreter for Mosaic GPU: JAX 0.12 does"
)


def check_hopper(pattern, queries, keys, **options):
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    check(pattern, queries, keys, dtype="bfloat16", implementation="mosaic_gpu", interpret=interpret, **options)


@interpreted
@pytest.mark.quick
def test_sinks_and_window_match_float64():
    """Sinks that share a step with blocks, whole blocks, cut ones, and blocks that one consumer leaves."""
    check_hopper(SinkWindow(5, 200), 300, 300, width=64, block_k=64)


@interpreted
@pytest.mark.parametrize(
    ("pattern", "queries", "keys", "options"),
    [
        pytest.param(Full(), 300, 300, {"heads": 4, "kv_heads": 2, "batch": 2, "learned": True}, id="full"),
        pytest.param(Full(), 700, 700, {"width": 128}, id="ring-turns"),
        pytest.param(SlidingWindow(1), 140, 140, {"width": 256, "block_k": 64}, id="itself-only"),
        pytest.param(Full(), 200, 700, {"offset": 390, "traced": True, "block_q": 256}, id="traced-offset"),
        pytest.param(Full(), 1, 500, {"offset": 499}, id="one-query"),
        pytest.param(SinkWindow(130, 60), 500, 500, {"softcap": 2.0}, id="many-sinks-softcap"),
        pytest.param(SlidingWindow(40), 200, 100, {"offset": 80, "heads": 3, "kv_heads": 3}, id="some-see-nothing"),
    ],
)
def test_matches_float64(pattern, queries, keys, options):
    check_hopper(pattern, queries, keys, **options)


@st.composite
def drawn(draw):
    queries, offset, kv_heads = draw(st.integers(1, 400)), draw(st.sampled_from([0, 37, 300])), draw(st.integers(1, 2))
    windows = (
        st.builds(SlidingWindow, st.integers(1, 300)),
        st.builds(SinkWindow, st.integers(0, 140), st.integers(1, 300)),
    )
    return (draw(st.one_of(st.just(Full()), *windows)), queries, queries + offset), {
        "offset": offset,
        "traced": draw(st.booleans()),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 3])),
        "width": draw(st.sampled_from(hopper_attention.WIDTHS)),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "learned": draw(st.booleans()),
        "block_q": 128,
        "block_k": draw(st.sampled_from([None, 64])),
        "seed": draw(st.integers(0, 9)),
    }


@interpreted
@pytest.mark.slow
@settings(max_examples=50)
@given(arguments=drawn())
def test_many_drawn(arguments):
    check_hopper(*arguments[0], **arguments[1])


@interpreted
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float32"}, "float32: 'mosaic_gpu' takes bfloat16"),
        ({"width": 80}, "width 80: 'mosaic_gpu' takes 64, 128, 256"),
        ({"segment_ids": jnp.zeros((1, 8), jnp.int32)}, "neither segment ids nor ALiBi"),
        ({"slopes": jnp.ones(2)}, "neither segment ids nor ALiBi"),
        ({"block_q": 64}, "blocks of 64 queries"),
        ({"width": 256, "block_q": 256, "block_k": 256}, "too large"),
    ],
)
def test_says_what_it_does_not_take(change, words):
    x = jnp.zeros((1, 8, 2, change.get("width", 64)), change.get("dtype", "bfloat16"))
    options = {name: value for name, value in change.items() if name not in ("width", "dtype")}
    with pytest.raises(ValueError, match=words):
        api.flash_attention(x, x, x, Full(), implementation="mosaic_gpu", **options)


@pytest.mark.skipif(hopper_attention.available(), reason="this JAX can")
def test_says_which_jax_it_needs():
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="cannot run 'mosaic_gpu'"):
        api.flash_attention(x, x, x, Full(), implementation="mosaic_gpu")


@pytest.mark.skipif(hopper_attention.available(interpret=True), reason="this JAX can")
def test_says_which_jax_interprets_it():
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"use JAX 0\.1[12]"):
        api.flash_attention(x, x, x, Full(), implementation="mosaic_gpu", interpret=True)


def test_is_not_what_gpus_take_by_default(monkeypatch):
    monkeypatch.setattr(platforms.jax, "default_backend", lambda: "gpu")
    assert platforms.platform_implementation() == "triton"
